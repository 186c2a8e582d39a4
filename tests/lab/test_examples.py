"""Each example does what it says."""

import contextlib
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel
from offmap.patience import scaled

pytestmark = pytest.mark.lab

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]


def here(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(example(name, *arguments), capture_output=True, text=True, check=False)


def test_all_are_tested_and_short() -> None:
    """The matrix is in test_measure.py, which looks at what it measures, too."""
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"best_backend", "check_host", "hidden_job", "small_matrix", "try_kernel"}
    for name in names:
        assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 40


@pytest.fixture(scope="module")
def image() -> None:
    """Make the image debian, unless the cache has it."""
    subprocess.run([sys.executable, "-m", "offmap", "image", "build"], check=True)


@pytest.mark.usefixtures("image")
def test_a_job_in_a_hidden_guest(lab_host: LabHost) -> None:
    done = lab_host.output(example("hidden_job", "tr a-z A-Z; echo done >&2; exit 5"), stdin=b"from a hidden guest\n")
    assert (done.status, done.stdout) == (5, b"FROM A HIDDEN GUEST\n"), done.stderr.decode()
    assert done.stderr == b"done\n"


@contextlib.contextmanager
def guest(host: LabHost, memory: str) -> Iterator[None]:
    """A guest whose command waits for the end of its input."""
    said = bytearray()
    is_up = threading.Event()

    def hear(data: bytes) -> None:
        said.extend(data)
        if b"up" in said:
            is_up.set()

    argv = [sys.executable, "-m", "offmap", "run", "--memory", memory, "--exec", "echo up; cat"]
    command = host.popen(argv, stdout=hear, stderr=hear, keep_stdin=True)
    try:
        assert is_up.wait(scaled(120)), said.decode()
        yield
    finally:
        command.close_stdin()
        assert command.wait(scaled(120)) == 0, said.decode()


@pytest.mark.usefixtures("image")
def test_a_check_of_all_vms(lab_host: LabHost) -> None:
    def check() -> tuple[int, str]:
        done = lab_host.output(example("check_host"))
        return done.status, done.stdout.decode()

    assert check() == (3, "UNKNOWN - there is no VM on this host\n")
    with guest(lab_host, "reserved"):
        assert check() == (0, "OK - 0 of 1 VMs exposed | exposed=0 vms=1 mapped_pages=0\n")
        refused = lab_host.output(example("hidden_job", "true"))
        assert refused.status == 2 and refused.stderr.startswith(b"no hidden RAM on this host: "), refused
        with guest(lab_host, "anon"):
            status, line = check()
    assert status == 2
    assert re.fullmatch(r"CRITICAL - 1 of 2 VMs exposed \| exposed=1 vms=2 mapped_pages=[1-9]\d*\n", line), line


def test_the_best_kind_of_ram_here(lab_host: LabHost) -> None:
    done = lab_host.output(example("best_backend"))
    assert (done.status, done.stdout) == (0, b"reserved\n"), done.stderr.decode()
    assert done.stderr.startswith(b"not unplugged: ") and b"offmap module load" in done.stderr


def test_a_kernel_in_a_disposable_host(lab_kernel: HostKernel) -> None:
    done = here("try_kernel", str(lab_kernel.vmlinuz))
    assert done.returncode == 0, done.stderr
    assert "reserved:             usable, and hides\n" in done.stdout
    assert f"{lab_kernel.release} is up" in done.stderr


def test_a_kernel_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "bzImage").write_bytes(bytes(4096))
    done = here("try_kernel", str(tmp_path / "bzImage"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "is no good as a host" in done.stderr
