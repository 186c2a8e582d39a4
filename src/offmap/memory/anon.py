"""Private anonymous memory: what most VMMs use. A baseline: the kernel maps every page of it."""

import mmap

from offmap.kvm import Vm
from offmap.memory.backend import Backend, check_host_has
from offmap.memory.backing import Backing
from offmap.uapi.mman import MADV_HUGEPAGE, MAP_NORESERVE


class Anon(Backend):
    name = "anon"
    discards = True

    def allocate(self, vm: Vm, size: int) -> list[Backing]:
        check_host_has(size)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        backing = Backing("anonymous memory", -1, size, flags=flags, discard=mmap.MADV_DONTNEED)
        backing.madvise(MADV_HUGEPAGE)  # as QEMU does; a host without THP says no and nothing is lost
        return [backing]
