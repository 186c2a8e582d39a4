"""Memory blocks that the offmap module takes from the running kernel, and gives back when the guest is gone.

They have no struct page, no direct map and no alias, and are mapped by 2M pages. The module zeroes blocks before it
hands them out and before it gives them back, however this process ends (kernel/module/unplug.c).
"""

import errno
from typing import Self

from offmap.errors import BackendRefused, KernelError
from offmap.kvm import Vm
from offmap.kvm.handle import Handle
from offmap.memory.backend import SEE_LOG, Backend
from offmap.memory.backing import Backing
from offmap.memory.module_device import open_module
from offmap.options import Options
from offmap.uapi import offmap_module as uapi
from offmap.units import format_size


class Unplugged(Backend):
    """``unplugged[,node=N]``: memory of NUMA node N, or of any."""

    name = "unplugged"
    usage = "node=N, a NUMA node of /sys/devices/system/node"
    hides = True
    may_be_aliased = False
    needs_module = True
    file = uapi.DEVICE

    def __init__(self, node: int = uapi.OFFMAP_ANY_NODE) -> None:
        self.node = node

    @classmethod
    def from_options(cls, options: Options) -> Self:
        return cls(options.number("node", uapi.OFFMAP_ANY_NODE, 0, (1 << 31) - 1))

    def allocate(self, vm: Vm, size: int) -> list[Backing]:
        # The mapping holds the file, and with the mapping's end the memory goes back.
        with self.open_file(size)[0] as device:
            return [Backing(uapi.DEVICE, device.fd, size)]

    def open_file(self, size: int) -> tuple[Handle, int]:
        """An open file that has at least `size` bytes, and how many it has.

        Raises:
            BackendRefused: the host cannot give so much.
        """
        device = open_module()
        request = uapi.offmap_unplug(size, self.node, 0)
        try:
            device.call("OFFMAP_UNPLUG", uapi.OFFMAP_UNPLUG, request)
        except KernelError as error:
            device.close()
            raise self._refusal(error, size, request.size) from None
        return device, int(request.size)

    def _refusal(self, error: KernelError, wanted: int, spare: int) -> BackendRefused:
        if error.errno == errno.EINVAL and self.node != uapi.OFFMAP_ANY_NODE:
            return BackendRefused(
                "this host cannot give unplugged memory",
                f"it has no NUMA node {self.node}",
                "see /sys/devices/system/node",
            )
        if error.errno == errno.ETIMEDOUT:
            return BackendRefused(
                f"the host could free {format_size(spare)} in time, not {format_size(wanted)}",
                "something holds pages in its memory blocks that cannot be moved now",
                "try again, end what pins memory, or raise timeout in /sys/module/offmap/parameters",
            )
        if error.errno != errno.ENOMEM:
            return BackendRefused(error.what, error.why, SEE_LOG)
        where = "" if self.node == uapi.OFFMAP_ANY_NODE else f" on node {self.node}"
        return BackendRefused(
            f"the host could spare {format_size(spare)} in whole memory blocks{where}, not {format_size(wanted)}",
            "the rest is in use, is kept for the host, or holds pages that cannot be moved",
            "ask for less, free memory, or boot the host with movablecore=",
        )
