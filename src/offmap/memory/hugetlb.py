"""Huge pages set aside by the host's administrator. A baseline: the kernel maps every page of it."""

import os
from pathlib import Path

from offmap.errors import BackendRefused
from offmap.kvm import Vm
from offmap.memory.backend import Backend, refused
from offmap.memory.backing import Backing
from offmap.memory.memfd import map_memfd
from offmap.options import Options
from offmap.typed import Self
from offmap.uapi.mman import MFD_HUGE_SHIFT, MFD_HUGETLB
from offmap.units import format_size, parse_size


class Hugetlb(Backend):
    """``hugetlb[,size=2M|1G]``."""

    name = "hugetlb"
    usage = "size=2M|1G"
    discards = True

    def __init__(self, page_size: int = 2 << 20) -> None:
        self.page_size = page_size

    @classmethod
    def from_options(cls, options: Options) -> Self:
        page_size = options.text("size", 2 << 20, parse_size)
        if page_size not in {2 << 20, 1 << 30}:
            options.refuse(f"hugetlb pages of {format_size(page_size)} do not exist on x86")
        return cls(page_size)

    def allocate(self, vm: Vm, size: int) -> list[Backing]:
        pool = Path(f"/sys/kernel/mm/hugepages/hugepages-{self.page_size >> 10}kB")
        what = f"this host cannot give {format_size(size)} of hugetlb memory"
        if size % self.page_size:
            raise BackendRefused(
                what,
                f"it is not a whole number of huge pages of {format_size(self.page_size)}",
                "choose another --memory-size",
            )
        need = size // self.page_size
        remedy = f"run: echo {need} > {pool}/nr_hugepages"
        try:
            free = int((pool / "free_hugepages").read_text()) - int((pool / "resv_hugepages").read_text())
        except OSError:
            raise BackendRefused(
                "this host cannot give hugetlb memory",
                f"it has no huge pages of {format_size(self.page_size)}",
                "use the other size=, or a kernel with CONFIG_HUGETLBFS",
            ) from None
        if free < need:
            raise BackendRefused(what, f"the guest needs {need} huge pages and this host has {free} free", remedy)
        flags = os.MFD_CLOEXEC | MFD_HUGETLB | (self.page_size.bit_length() - 1) << MFD_HUGE_SHIFT
        with refused():
            return [map_memfd("hugetlb memory", size, flags, remedy, page_size=self.page_size)]
