"""What a lab host's kernel accesses of guests' RAM, as its emulated processor sees it; and faults that it must see.

One emulated processor runs host and guest. Each test shows that they are told apart: a guest's kernel makes millions of
accesses by kernel-half addresses, of which none may count as the host's. Each load by the test module must count.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from offmap.compare.guest import READY, guest_initramfs
from offmap.kmod.lab_build import lab_module
from offmap.lab.access_log import AccessLog, AccessReport, Symbols
from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel
from offmap.uapi.page import PAGE_SIZE

from .alias_module import alias_module
from .conftest import RESERVED, soak
from .console import Guest

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(1200)]

NESTED = str(Path(__file__).with_name("nested_target.py"))
SLOW = 600.0  # seconds for what takes 20 here; the plugin costs three quarters of an emulated host's speed
RESERVED_PFNS = range(0x60000, 0x70000)
LOADS = 1000
MAPPED_MICROSECONDS = 1000


class Logged:
    """A host whose kernel's accesses are logged, and the log."""

    def __init__(self, host: LabHost, log: AccessLog, initrd: Path) -> None:
        self.host = host
        self.log = log
        self.initrd = initrd

    @contextmanager
    def guest(self, backend: str, *options: str) -> Iterator[Guest]:
        """A guest that is up; it is powered off at the end."""
        self.log.begin()
        boot = ("--initrd", str(self.initrd), "--cmdline", "console=ttyS0 quiet", "--memory", backend)
        with Guest(self.host, self.host.kernel.vmlinuz, *boot, *options) as guest:
            guest.expect(READY, SLOW)
            yield guest
            guest.keys("poweroff -f\n")
            assert guest.end(SLOW) == 0, guest.errors

    def report(self, pfns: range = range(0)) -> AccessReport:
        symbols = Symbols(self.host.output(["cat", "/proc/kallsyms"]).stdout.decode())
        report = self.log.report(symbols, pfns)
        assert report.unsound == ""
        # Both kinds of access were seen, in numbers that a boot has.
        assert report.host_accesses > 1_000_000
        return report

    def python(self, code: str, *arguments: str) -> str:
        done = self.host.output([sys.executable, "-c", code, *arguments], timeout=SLOW)
        assert done.status == 0, done.stderr.decode()
        return done.stdout.decode()


@contextmanager
def logged(kernel: HostKernel, folder: Path, module: Path) -> Iterator[Logged]:
    initrd = folder / "guest.initramfs"
    initrd.write_bytes(guest_initramfs())
    with LabHost.start(kernel, cmdline=RESERVED, access_log=folder / "log", timeout=SLOW) as host:
        assert host.run(["insmod", str(module)]) == 0
        yield Logged(host, AccessLog(folder / "log"), initrd)


MAP_AND_LOAD = f"""
import os, sys
fd = os.open("/dev/offmap-alias", os.O_RDWR)
os.write(fd, sys.argv[1].encode())
assert len(os.read(fd, {8 * LOADS})) == {8 * LOADS}
"""
FLASH = """
import os, sys
os.write(os.open("/dev/offmap-alias", os.O_RDWR), sys.argv[1].encode())
"""


def test_no_access_to_reserved_ram_but_those_that_are_planted(lab_kernel: HostKernel, tmp_path: Path) -> None:
    with logged(lab_kernel, tmp_path, alias_module(lab_kernel)) as lab:
        with lab.guest("reserved"):
            report = lab.report(RESERVED_PFNS)
            # The positive control of the telling: the guest's kernel, at the same kind of address, on the same frames.
            assert report.guest_upper_accesses > 1_000_000 and report.guest_frames > 4096
            assert (report.during, report.early, report.after) == (0, 0, 0)
            touched = lab.log.guest_pfns()
            assert set(touched) <= set(RESERVED_PFNS), "the guest has RAM that is not where it should be"

            # An alias: each of its loads is counted, and named.
            page = int(touched[len(touched) // 2]) * PAGE_SIZE
            lab.python(MAP_AND_LOAD, f"memremap {page:#x} {PAGE_SIZE}")
            report = lab.report(RESERVED_PFNS)
            assert (report.during + report.after, report.early) == (LOADS, 0)
            (site,) = report.sites
            assert site.symbol.startswith("alias_read+") and site.symbol.endswith("[offmap_alias]")
            assert (site.pa, site.stores) == (page, 0)

            # A mapping of a millisecond.
            other = int(touched[-1]) * PAGE_SIZE
            lab.python(FLASH, f"flash {other:#x} {MAPPED_MICROSECONDS}")
            report = lab.report(RESERVED_PFNS)
            assert report.during + report.after == LOADS + 1
            (site,) = (site for site in report.sites if site.pa == other)
            assert site.symbol.startswith("alias_write+") and site.during + site.after == 1
        # To its end, and until its memory is given back.
        report = lab.report(RESERVED_PFNS)
        assert report.during + report.after == LOADS + 1 and report.early == 0


def test_ordinary_ram_is_cleared_and_written_by_the_kernel(lab_kernel: HostKernel, tmp_path: Path) -> None:
    with logged(lab_kernel, tmp_path, alias_module(lab_kernel)) as lab:
        with lab.guest("anon", "--kvm-clock", "on"):
            touched = len(lab.log.guest_pfns())
        report = lab.report()
        # It clears each page when the guest first touches it, and writes the guest's clock.
        cleared = [site for site in report.early_sites if site.symbol.startswith("clear_page")]
        assert sum(site.frames for site in cleared) > touched // 2
        assert sum(site.accesses for site in cleared) >= 512 * sum(site.frames for site in cleared)
        clock = [site for site in report.sites if site.symbol.startswith("kvm_setup_guest_pvclock+")]
        assert clock and all(site.during > 0 for site in clock)

        # Nested pages: a guest's VMRUN makes KVM map the VMCB.
        lab.log.begin()
        done = lab.host.output([sys.executable, NESTED, "100"], timeout=SLOW)
        assert done.status == 0, done.stderr.decode()
        report, vmcb = lab.report(), int(done.stdout)
        sites = [site for site in report.sites if site.pa // PAGE_SIZE == vmcb]
        assert sum(site.during for site in sites if site.symbol.endswith("[kvm_amd]")) > 1000


@pytest.mark.parametrize("backend", ["unplugged", soak("secretmem-bridge")])
def test_no_access_to_ram_that_the_module_takes_away(lab_kernel: HostKernel, tmp_path: Path, backend: str) -> None:
    with logged(lab_kernel, tmp_path, lab_module(lab_kernel)) as lab:
        with lab.guest(backend):
            report = lab.report()
            assert report.guest_upper_accesses > 1_000_000 and report.guest_frames > 4096
            assert (report.during, report.after) == (0, 0)
        report = lab.report()
        assert (report.during, report.early) == (0, 0)
        # The positive control: the memory is cleared before Linux gets it back.
        assert report.after > 0
