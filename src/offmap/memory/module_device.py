"""/dev/offmap, the device of the offmap kernel module."""

import errno
import os

from offmap.errors import BackendRefused, KernelError
from offmap.kvm.handle import Handle
from offmap.uapi.offmap_module import DEVICE

_REMEDY = {
    errno.ENOENT: "load the module first: offmap module load",
    errno.EACCES: "run as root",
    errno.EPERM: "run with CAP_SYS_ADMIN (root)",
}


def open_device() -> Handle:
    """A new open file of it: what it is asked for stays with this file, and with mappings of it.

    Raises:
        BackendRefused: the module is not loaded, or we may not use it.
    """
    try:
        return Handle(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        failed = KernelError(f"open of {DEVICE}", error)
        raise BackendRefused(
            failed.what, failed.why, _REMEDY.get(failed.errno, "see the kernel's log: dmesg")
        ) from None
