"""Every command in the README works as it stands there."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from offmap.compare.guest import guest_initramfs
from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel
from offmap.patience import scaled

pytestmark = pytest.mark.lab

ROOT = Path(__file__).parents[2]
_MARKED = re.compile(r"<!-- test: (\w+) -->\n```(?:sh|python)\n(.*?)```", re.DOTALL)
_ANY = re.compile(r"^```(?:sh|python)$", re.MULTILINE)


def blocks() -> dict[str, str]:
    return dict(_MARKED.findall((ROOT / "README.md").read_text()))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder where the README's relative paths lead to this checkout, and what they write goes elsewhere."""
    (tmp_path / ".venv").symlink_to(Path(sys.prefix))
    return tmp_path


def converse(process: subprocess.Popen[bytes], until: bytes, answer: bytes) -> bytes:
    """Read standard error up to `until`, then type `answer`; all of standard error at the end."""
    seen = bytearray()
    if process.stderr is None or process.stdin is None or process.stdout is None:
        pytest.fail("the process has no pipes")
    drain = threading.Thread(target=process.stdout.read)
    drain.start()
    for line in process.stderr:
        seen += line
        if until in line:
            process.stdin.write(answer)
            process.stdin.flush()
    drain.join()
    process.wait(scaled(60))
    return bytes(seen)


def test_every_command_is_tested() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(_ANY.findall(text)) == len(blocks())
    assert set(blocks()) == {"demo", "patched", "test", "lab", "run", "exec", "audit", "doctor", "library", "wrap"}


def test_make_test_is_what_ci_runs() -> None:
    assert blocks()["test"].strip() == "make test"
    assert "make test" in (ROOT / ".ci" / "run").read_text()


_NUMBER = re.compile(r"0x[0-9a-f]+|\d[\d,.]*")


def shapes(text: str) -> list[str]:
    """The lines that say something, without their numbers and their spacing."""
    lines = (" ".join(_NUMBER.sub("N", line).replace("─", "").split()) for line in text.splitlines())
    return [line for line in lines if line]


def check_shown(output: str) -> None:
    """The README's first screen is such an output."""
    (shown,) = re.findall(
        r"^```\n( +pages   in direct .*?)```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )
    promised, printed = shapes(shown), shapes(output)
    begin = printed.index(promised[0])
    for promise, line in zip(promised, printed[begin : begin + len(promised)], strict=True):
        assert line.startswith(promise.removesuffix("…"))


def test_make_demo() -> None:
    done = subprocess.run(["sh", "-c", blocks()["demo"]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All as claimed" in done.stdout
    check_shown(done.stdout)
    report = json.loads((ROOT / "out" / "demo" / "report.json").read_text())
    cells = {cell["backend"]: cell for cell in report["cells"]}
    assert {name: cell["verdict"] for name, cell in cells.items()} == {
        "anon": "exposed",
        "memfd": "exposed",
        "reserved": "hidden",
        "unplugged": "hidden",
        "secretmem-bridge": "hidden",
        "qemu-unplugged": "hidden",
        "firecracker-anon": "exposed",
        "firecracker-unplugged": "hidden",
        "secretmem": None,
    }
    assert {cells[name]["canaries_found"] for name in ("anon", "memfd", "firecracker-anon")} == {64}
    for cell in (cell for cell in cells.values() if cell["verdict"] == "hidden"):
        assert cell["canaries_planted"] == 64
        assert cell["canaries_found"] == cell["direct_map_pages"] == 0
        assert cell["alias_pages"] == cell["unknown_pages"] == 0
        # All that Linux has without it: a guest has 256 MiB.
        assert cell["scanned_bytes"] > report["host"]["memory_bytes"] - (256 << 20)
    assert "GUP" in cells["secretmem"]["reason"]
    assert cells["unplugged"]["attack_ends"] is True
    assert cells["unplugged"]["attack"].startswith('ends at "guest: kernel"')
    assert 1000 < cells["unplugged"]["plain_attack_reads"] < 200_000


@pytest.mark.slow
@pytest.mark.timeout(1800)  # it may have to build the kernel
def test_make_demo_patched() -> None:
    done = subprocess.run(["sh", "-c", blocks()["patched"]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All as claimed" in done.stdout
    report = json.loads((ROOT / "out" / "demo-patched" / "report.json").read_text())
    cells = {(cell["backend"], cell["kvm_clock"]): cell for cell in report["cells"]}
    verdicts = {guest: (cell["verdict"], cell["clocksource"] == "kvm-clock") for guest, cell in cells.items()}
    hiding = [(name, clock) for name in ("secretmem", "guest_memfd-unmapped") for clock in ("off", "on")]
    assert verdicts == {
        **{(name, "auto"): ("exposed", True) for name in ("anon", "memfd", "guest_memfd")},
        **{(name, clock): ("hidden", clock == "on") for name, clock in hiding},
    }
    for guest, cell in cells.items():
        assert cell["canaries_planted"] == 64
        assert cell["canaries_found"] == (0 if guest in hiding else 64)
        if guest in hiding:
            assert cell["direct_map_pages"] == cell["alias_pages"] == cell["unknown_pages"] == 0
            assert cell["pages_populated"] == cell["ram_pages"] == 65536


def test_a_guest_in_a_disposable_host(checkout: Path) -> None:
    with subprocess.Popen(
        ["sh", "-c", blocks()["lab"]],
        cwd=checkout,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        said = converse(process, b"  walk ", b"poweroff -f\n")
    assert process.returncode == 0, said.decode()
    assert b"HIDDEN: none of the 65536 guest pages" in said


def test_a_wrapped_vmm(checkout: Path) -> None:
    command = blocks()["wrap"].replace("sleep 20", "cat")  # until its verdict has been read
    with subprocess.Popen(
        ["sh", "-c", command], cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        assert process.stdin is not None
        said = []
        for line in process.stderr:
            said.append(line.decode())
            if said[-1].startswith("offmap wrap: "):
                process.stdin.close()
    assert any(": HIDDEN: none of the 65536 guest pages" in line for line in said), said


def test_a_guest_of_ones_own(lab_host: LabHost, lab_kernel: HostKernel, lab_out: Path) -> None:
    initrd = lab_out / "readme.img"
    initrd.write_bytes(guest_initramfs())
    environment = {**os.environ, "KERNEL": str(lab_kernel.vmlinuz), "INITRD": str(initrd)}
    said = bytearray()
    console = bytearray()
    command = lab_host.popen(
        ["sh", "-c", blocks()["run"]],
        stdout=console.extend,
        stderr=_until(said, b"  walk ", lambda: command.write(b"nproc; poweroff -f\n")),
        env=environment,
        cwd=ROOT,
        keep_stdin=True,
    )
    assert command.wait(scaled(120)) == 0, said.decode()
    assert b"HIDDEN: none of the 65536 guest pages" in said
    assert b"\n2\r\n" in console


def test_a_job_in_a_hidden_guest(checkout: Path) -> None:
    text = (ROOT / "README.md").read_bytes()
    (checkout / "README.md").write_bytes(text)
    done = subprocess.run(["sh", "-c", blocks()["exec"]], cwd=checkout, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    image, digest, release = done.stdout.decode().splitlines()
    assert image.endswith("/debian")
    assert digest == f"{hashlib.sha256(text).hexdigest()}  -"
    assert release.endswith("-amd64")
    assert b"HIDDEN: none of the 65536 guest pages" in done.stderr


def test_a_job_from_python(lab_host: LabHost) -> None:
    subprocess.run([sys.executable, "-m", "offmap", "image", "build"], check=True, stdout=subprocess.DEVNULL)
    done = lab_host.output([sys.executable, "-c", blocks()["library"]])
    assert re.fullmatch(rb"\d[\w.+-]*-amd64 hidden\n", done.stdout), done.stderr.decode()


def _until(seen: bytearray, mark: bytes, act: Callable[[], object]) -> Callable[[bytes], None]:
    """A sink that gathers into `seen` and acts once when `mark` has come by."""

    def sink(data: bytes) -> None:
        before = mark in seen
        seen.extend(data)
        if not before and mark in seen:
            act()

    return sink


def test_an_audit_of_qemu(checkout: Path) -> None:
    done = subprocess.run(["sh", "-c", blocks()["audit"]], cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("EXPOSED: ")
    assert "of qemu-system-x86" in done.stdout


def test_doctor_on_this_host_and_in_the_lab(lab_host: LabHost) -> None:
    """What hides is said only where it was seen: the shared lab host has reserved memory, and no module."""
    done = lab_host.output(["sh", "-c", blocks()["doctor"]], cwd=ROOT)
    said = done.stdout.decode()
    assert done.status == 0, said + done.stderr.decode()
    assert "reserved:             usable, and hides\n" in said
    assert "anon:                 usable, and does not hide\n" in said
    assert "secretmem:            refused\n" in said
    assert "do: load the module first: offmap module load" in said
