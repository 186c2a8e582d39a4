"""guest_memfd that leaves the kernel's direct map. No released kernel has a flag for it; patched ones differ.

Each flag that KVM_CAP_GUEST_MEMFD_FLAGS advertises beyond those of Linux 6.18 is tried out with a guest of one
instruction. That does not prove what the flag does, so the RAM is audited before the guest gets it. offmap's own patch
(kernel/patches/) makes it bit 2, and takes 2 MiB at a time off the direct map.
"""

from collections.abc import Iterator
from functools import partial

from offmap.errors import BackendRefused, KernelError, OffmapError
from offmap.files import fallocate
from offmap.kvm import Vm
from offmap.memory.backend import ASK_FOR_LESS, Backend, check_host_has, refused
from offmap.memory.backing import Backing
from offmap.memory.guest_memfd import MAPPABLE, guest_memfd_flags, map_guest_memfd
from offmap.memory.populate import populate
from offmap.memory.probe import try_page
from offmap.options import Options
from offmap.typed import Self
from offmap.uapi.fs import FALLOC_FL_KEEP_SIZE
from offmap.uapi.page import PAGE_SIZE


class GuestMemfdUnmapped(Backend):
    """Attributes:
    bit: of the flag to use; None: the first that works.
    """

    name = "guest_memfd-unmapped"
    usage = "bit=N, a flag from 2 to 63"
    hides = True
    discards = True
    since = None
    page_by_page = True

    def __init__(self, bit: int | None = None) -> None:
        self.bit = bit

    @classmethod
    def from_options(cls, options: Options) -> Self:
        return cls(options.number("bit", None, 2, 63))

    def allocate(self, vm: Vm, size: int) -> list[Backing]:
        check_host_has(size)
        flags = MAPPABLE | self._probe(guest_memfd_flags(vm))
        with refused(ASK_FOR_LESS), map_guest_memfd(vm, size, flags).closed_on_error() as backing:
            if backing.guest_memfd is not None:
                _allocate_frames(backing.guest_memfd, size)
            # Every page into our page tables: an audit sees none that is not there.
            populate(backing, progress=self.progress)
        return [backing]

    def _probe(self, advertised: int) -> int:
        candidates = list(unknown_flags(advertised))
        if self.bit is not None:
            candidates = [flag for flag in candidates if flag == 1 << self.bit]
        reasons = []
        for flag in candidates:
            try:
                try_page(partial(map_guest_memfd, size=PAGE_SIZE, flags=MAPPABLE | flag))
                return flag
            except OffmapError as error:
                reasons.append(f"flag {flag:#x}: {error.reason}")
        raise BackendRefused(
            "this kernel's guest_memfd has no flag to leave the direct map",
            f"none works ({', '.join(reasons)})" if reasons else "it advertises none",
            "use --memory reserved or unplugged, or a patched kernel (offmap lab kernel build makes one)",
        )


def unknown_flags(advertised: int) -> Iterator[int]:
    """Yield those of the `advertised` flags, lowest first, whose meaning no released kernel has fixed."""
    extra = advertised & ~MAPPABLE
    while extra:
        yield extra & -extra
        extra &= extra - 1


def _allocate_frames(fd: int, size: int) -> None:
    """fallocate(2), in the only mode that guest_memfd has; where a kernel flushes TLBs once a page, it is no slower.

    Raises:
        KernelError: the host has not so much memory.
    """
    try:
        fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, size)
    except OSError as error:
        raise KernelError("fallocate of guest_memfd", error) from None
