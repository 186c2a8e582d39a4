"""Shared anonymous memory: a kind of RAM made up for a test."""

import mmap

from offmap.kvm import Vm
from offmap.memory.backend import Backend, check_host_has
from offmap.memory.backing import Backing

__all__ = ["Lent"]


class Lent(Backend):
    name = "lent"

    def allocate(self, vm: Vm, size: int) -> list[Backing]:
        check_host_has(size)
        return [Backing("lent memory", -1, size, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)]
