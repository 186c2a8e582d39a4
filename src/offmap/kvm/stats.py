"""KVM's binary statistics (Documentation/virt/kvm/api.rst, KVM_GET_STATS_FD), and what they tell of page sizes.

The file describes itself: a header, a descriptor with a name for each statistic, and a block of 64-bit values. Pure:
what reads the file is passed in.
"""

import ctypes
import struct
from collections.abc import Callable, Mapping

from offmap.typed import NamedTuple, Self
from offmap.uapi.kvm import kvm_stats_desc, kvm_stats_header

Read = Callable[[int, int], bytes]
"""(size, offset) -> that part of the file, shorter at its end."""


def read_stats(read: Read) -> dict[str, tuple[int, ...]]:
    """All statistics of one VM or vCPU by name: one value for a counter, several for a histogram."""
    header = kvm_stats_header.from_buffer_copy(read(ctypes.sizeof(kvm_stats_header), 0))
    stride = ctypes.sizeof(kvm_stats_desc) + header.name_size
    descriptors = read(stride * header.num_desc, header.desc_offset)
    described = []
    for start in range(0, len(descriptors), stride):
        desc = kvm_stats_desc.from_buffer_copy(descriptors, start)
        name = descriptors[start + ctypes.sizeof(kvm_stats_desc) : start + stride].partition(b"\0")[0].decode()
        described.append((name, desc.offset, desc.size))
    # One read: the kernel copies the block as it is at that moment.
    data = read(max((offset + 8 * count for _, offset, count in described), default=0), header.data_offset)
    return {name: struct.unpack_from(f"={count}Q", data, offset) for name, offset, count in described}


class MappedPages(NamedTuple):
    """Leaf entries of each size in the page tables that KVM runs a guest by."""

    pages_4k: int
    pages_2m: int
    pages_1g: int

    @classmethod
    def of(cls, stats: Mapping[str, tuple[int, ...]]) -> Self | None:
        """Pick them out of a VM's statistics; None where they are not among them."""
        try:
            return cls(*(stats[name][0] for name in ("pages_4k", "pages_2m", "pages_1g")))
        except KeyError:
            return None

    def by_size(self) -> dict[str, int]:
        """The number of entries of each size, largest first."""
        return {"1G": self.pages_1g, "2M": self.pages_2m, "4K": self.pages_4k}

    def __str__(self) -> str:
        """Like ``128 x 2M, 12 x 4K``."""
        return ", ".join(f"{count} x {size}" for size, count in self.by_size().items() if count) or "nothing mapped"
