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
from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel
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
                "guest_memfd",
                "KVM_SET_CPUID",
                "int 0x80",
            ),
            "EPERM",
        )
        slots = ("anonymous", "read-only slot", "private file", "part of a mapping", "two mappings")
        assert found == {
            "clock": "refused",
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
