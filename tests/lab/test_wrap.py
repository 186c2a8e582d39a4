"""Other people's VMMs, wrapped: their guests on hidden memory, on a stock kernel."""

import json
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from offmap.compare.guest import READY, guest_initramfs
from offmap.kmod.lab_build import lab_module
from offmap.lab.command import LabCommand
from offmap.lab.firecracker import released_firecracker
from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel
from offmap.lab.vmlinux import vmlinux_of
from offmap.patience import scaled

from .alias_module import alias_module

pytestmark = pytest.mark.lab

ROOT = Path(__file__).parents[2]
PATIENCE = scaled(60.0)
OFFMAP = [sys.executable, "-m", "offmap"]
VMM = [sys.executable, "-m", "tests.lab.wrap_vmm"]
HERE = "/dev/offmap"


class Started:
    """A command in the host that is listened to while it runs."""

    def __init__(self, host: LabHost, argv: list[str]) -> None:
        self._heard = ""
        self._more = threading.Condition()
        self.command: LabCommand = host.popen(argv, stdout=self._hear, stderr=self._hear, keep_stdin=True, cwd=ROOT)

    def _hear(self, data: bytes) -> None:
        with self._more:
            self._heard += data.decode(errors="replace")
            self._more.notify_all()

    def await_(self, pattern: str) -> str:
        """Wait until its output has this; returns what the first group matches."""
        with self._more:
            assert self._more.wait_for(lambda: re.search(pattern, self._heard, re.MULTILINE), PATIENCE), self._heard
            found = re.search(pattern, self._heard, re.MULTILINE)
            assert found
            return found[1]

    def end(self) -> str:
        """Kill it, if it runs; returns all that it said."""
        self.command.kill()
        self.command.wait(PATIENCE)
        return self._heard


@pytest.fixture(scope="module")
def host(lab_kernel: HostKernel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabHost]:
    out = tmp_path_factory.mktemp("out")
    with LabHost.start(lab_kernel, memory="2G", accel="tcg", out=out) as host:
        for module in (lab_module(host.kernel), alias_module(host.kernel)):
            shutil.copy(module, out)
            assert host.output(["insmod", str(out / module.name)]).status == 0
        (out / "guest.initramfs").write_bytes(guest_initramfs())
        yield host
        log = host.output(["dmesg"]).stdout.decode()
        assert not re.search(r"WARNING:|BUG:", log), log


def qemu(host: LabHost) -> list[str]:
    assert host.options.out is not None
    command = "qemu-system-x86_64 -nodefaults -no-user-config -display none -accel kvm -m 256M -M q35 -cpu host"
    guest = ["-kernel", str(host.kernel.vmlinuz), "-initrd", str(host.options.out / "guest.initramfs")]
    return [*command.split(), *guest, "-append", "console=ttyS0 quiet reboot=t", "-serial", "stdio"]


def audit(host: LabHost, pid: int) -> Any:
    return json.loads(host.output([*OFFMAP, "audit", str(pid), "--json"], timeout=PATIENCE).stdout)


def test_an_unmodified_qemu_with_ordinary_memory_is_hidden(host: LabHost) -> None:
    vmm = Started(host, [*OFFMAP, "wrap", "--", *qemu(host)])
    try:
        vmm.await_(f"({READY})")
        pid = int(vmm.await_(r"offmap wrap: process (\d+): HIDDEN: none of the \d+ guest pages of qemu-system-x86"))
        result = audit(host, pid)
        assert (result["verdict"], result["pages"]["direct_map_pages"], result["aliases"]) == ("hidden", 0, [])
        assert result["pages"]["ram_pages"] >= 65536
    finally:
        said = vmm.end()
    assert "refused" not in said


def test_the_same_qemu_without_the_wrapper_is_exposed(host: LabHost) -> None:
    vmm = Started(host, ["sh", "-c", 'echo "pid $$"; exec "$@"', "sh", *qemu(host)])
    try:
        pid = int(vmm.await_(r"^pid (\d+)"))
        vmm.await_(f"({READY})")
        assert audit(host, pid)["verdict"] == "exposed"
    finally:
        vmm.end()


def test_a_vmm_that_would_get_around_it(host: LabHost) -> None:
    vmm = Started(host, [*OFFMAP, "wrap", "--", *VMM])
    try:
        found = json.loads(vmm.await_(r"^(\{.*\})$"))
        pid = found.pop("pid")
        assert found.pop("cpuid").pop("leaves") > 10
        assert found.pop("refused") == dict.fromkeys(
            (
                "userfaultfd",
                "no access",
                "executable",
                "shared memfd",
                "shared anonymous",
                "hole",
                "of the kernel",
                "Xen",
                "guest_memfd",
                "KVM_SET_CPUID",
                "int 0x80",
            ),
            "EPERM",
        )
        slots = ("anonymous", "read-only slot", "private file", "part of a mapping", "two mappings")
        assert found == {
            "clock": dict.fromkeys(("usual", "behind others", "no CPUID"), "refused"),
            "placed": {**{slot: ["", HERE, True] for slot in slots}, "around it": ["", ""]},
            "zeroed": [True, False],
            "kept": {
                "unmap a part": "EPERM",
                "map over": "EPERM",
                "protect": "EPERM",
                "move": "EPERM",
                "give back": "EINVAL",
                "whole": True,
            },
            "flipped": [""],
        }
        vmm.await_(rf"^(offmap wrap: process {pid}: HIDDEN)")
        # What changes afterwards is audited as well: now the kernel maps a page of it.
        vmm.command.write(b"\n")
        vmm.await_(rf"^(offmap wrap: process {pid}: EXPOSED: 1 of .*; it is ended)")
        assert vmm.command.wait(PATIENCE) in {-9, 137}
    finally:
        said = vmm.end()
    for why in ("registered with userfaultfd", "is a shared file", "nothing is mapped", "guest_memfd", "another ABI"):
        assert why in said


def test_the_same_vmm_without_the_wrapper_is_exposed(host: LabHost) -> None:
    vmm = Started(host, [*VMM, "plain"])
    try:
        found = json.loads(vmm.await_(r"^(\{.*\})$"))
        assert found["placed"] == ["", "", True]
        assert audit(host, found["pid"])["verdict"] == "exposed"
    finally:
        vmm.end()


def test_the_vmm_ends_as_without_a_wrapper(host: LabHost) -> None:
    def ends(*words: str) -> tuple[int, str]:
        done = host.output([*OFFMAP, "wrap", *words], stdin=b"typed", timeout=PATIENCE)
        return done.status, (done.stdout + done.stderr).decode()

    assert ends("--", "sh", "-c", "cat; exit 37") == (37, "typed")
    assert ends("--", "sh", "-c", "kill -TERM $$")[0] in {-15, 143}
    status, said = ends("--", "no-such-vmm")
    assert (status, "there is no program no-such-vmm" in said) == (2, True)
    status, said = ends("--", *OFFMAP, "wrap", "--", "true")
    assert (status, "start it outside what has the one listener" in said) == (2, True)
    status, said = ends("--memory", "pool", "--", "true")
    assert (status, "make a pool" in said) == (2, True)
    # None of the supervisors stays.
    left = 'cat /proc/[0-9]*/cmdline | tr "\\0" " " | grep -q "[o]ffmap wrap"'
    assert host.run(["sh", "-c", f"while {left}; do sleep 0.1; done"], timeout=PATIENCE) == 0


@pytest.fixture(scope="module")
def firecracker(request: pytest.FixtureRequest, host: LabHost) -> Path:
    """Give a Firecracker, and put in /run what its guests boot."""
    assert host.options.out is not None
    shutil.copy(vmlinux_of(host.kernel.vmlinuz), host.options.out / "vmlinux")
    # The output folder is uncached 9p, which cannot read into hidden memory.
    files = [str(host.options.out / name) for name in ("vmlinux", "guest.initramfs")]
    assert host.run(["cp", *files, "/run"]) == 0
    given = request.config.getoption("--firecracker")
    return Path(given).absolute() if given else released_firecracker()


@pytest.fixture(scope="module")
def boot_source(host: LabHost, firecracker: Path) -> dict[str, str]:
    """Give the guest's kernel. It has no clock but the TSC, and nothing to measure that by: it has to be told."""
    ask = "from offmap.kvm import Kvm\nwith Kvm() as k, k.create_vm() as v, v.create_vcpu(0) as c: print(c.tsc_khz())"
    khz = int(host.output([sys.executable, "-c", ask], timeout=PATIENCE).stdout)
    quiet = "i8042.noaux i8042.nomux i8042.dumbkbd"  # Firecracker logs reads of ports that it does not have
    words = f"console=ttyS0 quiet reboot=k panic=1 pci=off {quiet} tsc=reliable tsc_early_khz={khz}"
    return {"kernel_image_path": "/run/vmlinux", "initrd_path": "/run/guest.initramfs", "boot_args": words}


HIDDEN = r"offmap wrap: process (\d+): HIDDEN: none of the \d+ guest pages of firecracker"


def config(boot_source: dict[str, str], out: Path, name: str) -> str:
    """A configuration file for Firecracker."""
    machine = {"vcpu_count": 1, "mem_size_mib": 128}
    (out / name).write_text(json.dumps({"boot-source": boot_source, "drives": [], "machine-config": machine}))
    return str(out / name)


def test_a_released_firecracker_is_hidden(host: LabHost, firecracker: Path, boot_source: dict[str, str]) -> None:
    assert host.options.out is not None
    command = [str(firecracker), "--no-api", "--config-file", config(boot_source, host.options.out, "config.json")]
    vmm = Started(host, [*OFFMAP, "wrap", "--", *command])
    try:
        vmm.await_(f"({READY})")
        pid = int(vmm.await_(HIDDEN))
        result = audit(host, pid)
        assert (result["verdict"], result["pages"]["mapped_pages"], result["aliases"]) == ("hidden", 0, [])
        assert result["pages"]["ram_pages"] == 32768
    finally:
        assert "refused" not in vmm.end()
    vmm = Started(host, ["sh", "-c", 'echo "pid $$"; exec "$@"', "sh", *command])
    try:
        pid = int(vmm.await_(r"^pid (\d+)"))
        vmm.await_(f"({READY})")
        result = audit(host, pid)
        assert (result["verdict"], result["vmm"]["vmm"]) == ("exposed", "Firecracker")
    finally:
        vmm.end()


def call(host: LabHost, path: str, *calls: tuple[str, str, object]) -> None:
    done = host.output(
        [sys.executable, "-m", "tests.lab.firecracker_api", path, json.dumps(calls)], timeout=PATIENCE, cwd=ROOT
    )
    assert done.status == 0, done.stderr.decode()


def test_a_snapshot_is_restored_to_hidden_memory(host: LabHost, firecracker: Path, boot_source: dict[str, str]) -> None:
    folder = "/run/snapshot"
    assert host.run(["mkdir", folder]) == 0
    first = Started(host, [*OFFMAP, "wrap", "--", str(firecracker), "--api-sock", f"{folder}/first"])
    try:
        call(
            host,
            f"{folder}/first",
            ("PUT", "/machine-config", {"vcpu_count": 2, "mem_size_mib": 128}),
            ("PUT", "/boot-source", boot_source),
            ("PUT", "/actions", {"action_type": "InstanceStart"}),
        )
        first.await_(f"({READY})")
        first.await_(HIDDEN)
        files = {"snapshot_path": f"{folder}/state", "mem_file_path": f"{folder}/memory"}
        call(
            host,
            f"{folder}/first",
            ("PATCH", "/vm", {"state": "Paused"}),
            ("PUT", "/snapshot/create", {"snapshot_type": "Full", **files}),
        )
    finally:
        assert "refused" not in first.end()
    second = Started(host, [*OFFMAP, "wrap", "--", str(firecracker), "--api-sock", f"{folder}/second"])
    try:
        memory = {"backend_type": "File", "backend_path": f"{folder}/memory"}
        load = {"snapshot_path": f"{folder}/state", "mem_backend": memory, "resume_vm": True}
        call(host, f"{folder}/second", ("PUT", "/snapshot/load", load))
        pid = int(second.await_(HIDDEN))
        second.command.write(b"echo still $((6 * 7))\n")
        second.await_("(still 42)")
        assert audit(host, pid)["verdict"] == "hidden"
    finally:
        assert "refused" not in second.end()


def test_under_its_jailer_it_is_hidden(host: LabHost, firecracker: Path, boot_source: dict[str, str]) -> None:
    out, root = host.options.out, f"/run/jail/{firecracker.name}/one/root"
    assert out is not None
    inside = {**boot_source, "kernel_image_path": "vmlinux", "initrd_path": "guest.initramfs"}
    config(inside, out, "jailed.json")
    files = f"/run/vmlinux /run/guest.initramfs {out}/jailed.json"
    assert host.run(["sh", "-c", f"mkdir -p {root} && cp {files} {root} && chmod -R a+rX /run/jail"]) == 0
    jailer = [str(firecracker.with_name("jailer")), "--id", "one", "--exec-file", str(firecracker)]
    jailer += ["--uid", "12345", "--gid", "12345", "--chroot-base-dir", "/run/jail"]
    vmm = Started(host, [*OFFMAP, "wrap", "--", *jailer, "--", "--no-api", "--config-file", "jailed.json"])
    try:
        vmm.await_(f"({READY})")
        pid = int(vmm.await_(HIDDEN))
        seen = host.output(["sh", "-c", f"grep ^Uid: /proc/{pid}/status; ls /proc/{pid}/root"]).stdout.decode()
        assert "12345" in seen
        assert "jailed.json" in seen
    finally:
        assert "refused" not in vmm.end()
