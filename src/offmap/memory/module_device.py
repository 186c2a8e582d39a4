"""/dev/offmap, the device of the offmap kernel module."""

from offmap.hidden_files import device_file
from offmap.kvm.handle import Handle


def open_module() -> Handle:
    """A new open file of it: what it is asked for stays with this file, and with mappings of it.

    Raises:
        BackendRefused: the module is not loaded, or we may not use it.
    """
    return Handle(device_file())
