"""Huge pages set aside by the host's administrator. A baseline: the kernel maps every page of it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from offmap.errors import BackendRefused, KernelError, OffmapError
from offmap.kvm import Vm
from offmap.memory.backend import Backend
from offmap.memory.backing import Backing
from offmap.memory.memfd import map_memfd
from offmap.uapi.mman import MFD_HUGE_SHIFT, MFD_HUGETLB
from offmap.units import format_size, parse_size

__all__ = ["Hugetlb"]


class Hugetlb(Backend):
    """``hugetlb[,size=2M|1G]``."""

    name = "hugetlb"
    discards = True

    def __init__(self, page_size: int = 2 << 20) -> None:
        self.page_size = page_size

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        rest = dict(options)
        page_size = parse_size(rest.pop("size", "2M"))
        if page_size not in {2 << 20, 1 << 30}:
            raise OffmapError(
                f"hugetlb pages of {format_size(page_size)} do not exist on x86", "use size=2M or size=1G"
            )
        if rest:
            raise OffmapError(f"memory backend hugetlb has no option {next(iter(rest))!r}", "its option is size=2M|1G")
        return cls(page_size)

    def allocate(self, vm: Vm, size: int) -> list[Backing]:
        pool = Path(f"/sys/kernel/mm/hugepages/hugepages-{self.page_size >> 10}kB")
        if size % self.page_size:
            raise BackendRefused(
                f"{format_size(size)} of RAM is not a whole number of huge pages of {format_size(self.page_size)}",
                "choose another --memory-size",
            )
        need = size // self.page_size
        remedy = f"run: echo {need} > {pool}/nr_hugepages"
        try:
            free = int((pool / "free_hugepages").read_text()) - int((pool / "resv_hugepages").read_text())
        except OSError:
            raise BackendRefused(f"this host has no huge pages of {format_size(self.page_size)}") from None
        if free < need:
            raise BackendRefused(f"the guest needs {need} huge pages and this host has {free} free", remedy)
        flags = os.MFD_CLOEXEC | MFD_HUGETLB | (self.page_size.bit_length() - 1) << MFD_HUGE_SHIFT
        try:
            return [map_memfd("hugetlb memory", "offmap-ram", size, flags, remedy, page_size=self.page_size)]
        except KernelError as error:
            raise BackendRefused(error.what, error.remedy) from None
