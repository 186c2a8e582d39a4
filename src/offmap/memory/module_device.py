"""/dev/offmap, the device of the offmap kernel module."""

import errno

from offmap.kvm.handle import Handle, open_device
from offmap.memory.backend import refused
from offmap.uapi.offmap_module import DEVICE

_REMEDY = {
    errno.ENOENT: "load the module first: offmap module load",
    errno.EACCES: "run as root",
    errno.EPERM: "run with CAP_SYS_ADMIN (root)",
}


def open_module() -> Handle:
    """A new open file of it: what it is asked for stays with this file, and with mappings of it.

    Raises:
        BackendRefused: the module is not loaded, or we may not use it.
    """
    with refused(_REMEDY):
        return Handle(open_device(DEVICE))
