"""Where the benchmarks of a host run: a disposable one, in which this same script runs a second time."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from offmap.compare.guest import guest_initramfs
from offmap.lab.host import LabHost
from offmap.lab.provision import host_kernel

__all__ = ["GUEST_SIZE", "run_in_lab"]

GUEST_SIZE = "256M"
_RESERVED = "memmap=256M$0x40000000"  # GUEST_SIZE at 1 GiB that the host kernel never owns


def run_in_lab(script: str, arguments: Sequence[str], memory: str = "2G", timeout: float = 900.0) -> int:
    """Start a disposable host and run ``script --inside`` in it, its output on ours.

    Args:
        arguments: given on; ``--guest-kernel`` and ``--guest-initrd`` are added.
        timeout: seconds that it may take.

    Returns:
        Its exit status.

    Raises:
        OffmapError: the host could not be made, or did not last.
    """
    kernel = host_kernel()
    with tempfile.TemporaryDirectory() as folder:
        initrd = Path(folder) / "guest.initramfs"
        initrd.write_bytes(guest_initramfs())
        argv = [sys.executable, str(Path(script).resolve()), "--inside", *arguments]
        argv += ["--guest-kernel", str(kernel.vmlinuz), "--guest-initrd", str(initrd)]
        with LabHost.start(kernel, memory=memory, cmdline=_RESERVED) as host:
            return host.run(argv, timeout=timeout)
