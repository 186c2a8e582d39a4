"""Memory blocks that the offmap module takes from the running kernel, and gives back when the guest is gone.

They have no struct page, no direct map and no alias, and are mapped by 2M pages. The module zeroes blocks before it
hands them out and before it gives them back, however this process ends (kernel/module/unplug.c).
"""

import os

from offmap.hidden_files import unplugged_file
from offmap.kvm import Vm
from offmap.memory.backend import Backend
from offmap.memory.backing import Backing
from offmap.options import Options
from offmap.typed import Self
from offmap.uapi import offmap_module as uapi


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
        fd, _ = unplugged_file(size, self.node)
        try:
            # The mapping holds the file, and with the mapping's end the memory goes back.
            return [Backing(uapi.DEVICE, fd, size)]
        finally:
            os.close(fd)

    def placed_from(self) -> list[str]:
        return ["unplugged", str(self.node)]
