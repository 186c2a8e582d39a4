"""The guest's pages by their frames: which of its pages a frame is, and which pages only it sees side by side."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offmap.audit.guest_ram import RamRange
from offmap.audit.intervals import Ints
from offmap.uapi.page import PAGE_SIZE

_NOWHERE = -1


@dataclass(frozen=True)
class GuestPages:
    """Runs of neighbouring pages with neighbouring frames, in order of their first frame.

    Attributes:
        pfn, pages: frames of each run.
        va: where the audited process has its first page.
        guest_phys_addr: where the guest has it; negative where that is not known.
    """

    pfn: Ints
    pages: Ints
    va: Ints
    guest_phys_addr: Ints

    @classmethod
    def of(cls, page: Ints, pfn: Ints, pages: Ints, ranges: Iterable[RamRange]) -> "GuestPages":
        """From populated runs.

        Args:
            page: first page of each run, counted through all ranges; ascending; no run leaves its range.
            pfn, pages: frames of each run.
            ranges: of guest RAM.
        """
        parts = list(ranges)
        first = np.cumsum([0, *(part.pages for part in parts)])
        index = np.searchsorted(first, page, side="right") - 1
        within = (page - first[index]) * PAGE_SIZE
        va = np.array([part.va for part in parts], dtype=np.int64)[index] + within
        places = [_NOWHERE if part.guest_phys_addr is None else part.guest_phys_addr for part in parts]
        gpa = np.array(places, dtype=np.int64)[index]
        gpa = np.where(gpa < 0, _NOWHERE, gpa + within)
        order = np.argsort(pfn, kind="stable")
        return cls(pfn[order], pages[order], va[order], gpa[order])

    @classmethod
    def none(cls) -> "GuestPages":
        empty = np.zeros(0, dtype=np.int64)
        return cls(empty, empty, empty, empty)

    def __contains__(self, frame: int) -> bool:
        return self.find(frame) is not None

    def find(self, frame: int) -> tuple[int, int | None] | None:
        """(address in the process, guest-physical address or None) of the page with this frame; None if there is none.

        A frame that stands behind several pages is given as one of them.
        """
        # A look at every run: they may overlap, where the process has a page twice.
        here = np.flatnonzero((self.pfn <= frame) & (frame < self.pfn + self.pages))
        if not len(here):
            return None
        index = int(here[0])
        offset = (frame - int(self.pfn[index])) * PAGE_SIZE
        guest = int(self.guest_phys_addr[index])
        return int(self.va[index]) + offset, None if guest < 0 else guest + offset

    def seams(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """Pairs of frames (of each, the one that comes first) that are neighbours for the process but not in RAM."""
        order = np.argsort(self.va, kind="stable")
        va, pfn, pages = self.va[order], self.pfn[order], self.pages[order]
        last = pfn[:-1] + pages[:-1] - 1
        seam = (va[:-1] + pages[:-1] * PAGE_SIZE == va[1:]) & (last + 1 != pfn[1:])
        first, second = last[seam], pfn[1:][seam]
        by_frame = np.argsort(first, kind="stable")
        return first[by_frame].astype(np.uint64), second[by_frame].astype(np.uint64)
