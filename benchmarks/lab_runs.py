"""Where the benchmarks of a host run: a disposable one, in which this same script runs a second time."""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from offmap.compare.guest import guest_initramfs
from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel
from offmap.lab.provision import host_kernel
from offmap.lab.qemu import find_qemu

__all__ = ["GUEST_SIZE", "add_icount_option", "add_inside_options", "qemu_argv", "run_in_lab", "shmem_huge_pages"]

GUEST_SIZE = "256M"
_RESERVED = "memmap=256M$0x40000000"  # GUEST_SIZE at 1 GiB that the host kernel never owns

_SHMEM_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


def add_icount_option(parser: argparse.ArgumentParser) -> None:
    """Add what `run_in_lab` takes as ``icount``."""
    words = "the host's clocks count instructions: how busy the machine is changes no figure"
    parser.add_argument("--icount", action="store_true", help=words)


@contextmanager
def shmem_huge_pages(policy: str) -> Iterator[None]:
    """For as long as this lasts, this (disposable) host gives a memfd huge pages by `policy`: "never", "advise"…"""
    before = _SHMEM_ENABLED.read_text().partition("[")[2].partition("]")[0]
    _SHMEM_ENABLED.write_text(policy)
    try:
        yield
    finally:
        _SHMEM_ENABLED.write_text(before)


def qemu_argv(machine: str) -> list[str]:
    """The peer of `offmap run`, before its guest: QEMU with as little in it as can be, and GUEST_SIZE of ordinary RAM.

    Raises:
        OffmapError: there is no QEMU.
    """
    argv = [find_qemu(), "-M", machine, "-accel", "kvm", "-cpu", "host", "-m", GUEST_SIZE, "-smp", "1"]
    return [*argv, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"]


def add_inside_options(parser: argparse.ArgumentParser, *more: str) -> None:
    """Add what the script is told where it runs in the host, hidden: what `run_in_lab` says, and ``more``."""
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    for option in ("--guest-kernel", "--guest-initrd", *more):
        parser.add_argument(option, default="", help=argparse.SUPPRESS)


def run_in_lab(
    script: str,
    arguments: Sequence[str],
    memory: str = "2G",
    timeout: float = 900.0,
    *,
    kernel: HostKernel | None = None,
    cmdline: str = "",
    initrd: bytes | None = None,
    icount: bool = False,
) -> int:
    """Start a disposable host and run ``script --inside`` in it, its output on ours.

    Args:
        arguments: given on; ``--guest-kernel`` and ``--guest-initrd`` are added.
        memory: the host's RAM.
        timeout: seconds that it may take.
        kernel: what the host runs; None: the usual one. The guest's kernel is always that.
        cmdline: added to the host's kernel command line.
        initrd: the guest's; None: the small guest.
        icount: the host's clocks count instructions.

    Returns:
        Its exit status.

    Raises:
        OffmapError: the host could not be made, or did not last.
    """
    guest_kernel = host_kernel()
    with tempfile.TemporaryDirectory() as folder:
        guest_initrd = Path(folder) / "guest.initramfs"
        guest_initrd.write_bytes(guest_initramfs() if initrd is None else initrd)
        argv = [sys.executable, str(Path(script).resolve()), "--inside", *arguments]
        argv += ["--guest-kernel", str(guest_kernel.vmlinuz), "--guest-initrd", str(guest_initrd)]
        words = f"{_RESERVED} {cmdline}".strip()
        accel = "icount" if icount else "auto"
        with LabHost.start(kernel or guest_kernel, memory=memory, cmdline=words, accel=accel) as host:
            return host.run(argv, timeout=timeout)
