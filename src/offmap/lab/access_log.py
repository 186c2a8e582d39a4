"""Reading the access log of a disposable host: which frames of guests its kernel accessed, when, and by which code.

qemu/access-log.c writes the log while the host runs, and says what is seen and what is not. The log's clock is the
number of times that the processor entered a guest.
"""

import bisect
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from offmap.lab.errors import LabError
from offmap.uapi.page import PAGE_SIZE

Pfns = npt.NDArray[np.int64]

_MAGIC = b"offmapal"
_FORMAT = 1
_HEADER = np.dtype(
    [("magic", "S8")]
    + [
        (name, "<u8")
        for name in (
            *("format", "frames", "sites", "generation", "vmruns", "vmexits"),
            *("mismatches", "lost", "sites_lost", "host", "host_io", "guest", "guest_upper"),
        )
    ]
)
_SITE = np.dtype(
    [(name, "<u8") for name in ("rip", "during", "tail", "tail_vmrun", "stores", "frame", "vaddr", "unused")]
)
_FRAME = np.dtype(
    [("generation", "<u4"), ("guest", "<u4")]
    + [(name, "<u8") for name in ("early", "early_rip", "during", "tail", "tail_vmrun", "rip", "vaddr")]
)
# A q35 machine of this much RAM or more has 2 GiB of it below 4 GiB, and the rest above (pc_q35_init in QEMU's
# hw/i386/pc_q35.c). The plugin counts frames as if there were no gap.
_SPLIT = 0xB0000000 // PAGE_SIZE
_BELOW = 0x80000000 // PAGE_SIZE
_GAP = 0x80000000 // PAGE_SIZE


class Site(msgspec.Struct, frozen=True):
    """An instruction of the host's kernel that accessed frames of guests.

    Attributes:
        rip: its address.
        symbol: function and offset, and the module in brackets; empty if the host's symbols were not asked for.
        during: how many accesses, while a guest was there that had touched the frame.
        after: how many accesses after the last instruction of the last guest.
        stores: how many of them all wrote.
        pa, va: the addresses of the first.
    """

    rip: int
    symbol: str
    during: int
    after: int
    stores: int
    pa: int
    va: int


class EarlySite(msgspec.Struct, frozen=True):
    """An instruction that accessed frames before their guest did.

    Attributes:
        rip, symbol: as in `Site`.
        frames: frames whose first access this was.
        accesses: all early accesses to these frames.
        pa: the address of one of them.
    """

    rip: int
    symbol: str
    frames: int
    accesses: int
    pa: int


class AccessReport(msgspec.Struct, frozen=True):
    """What the log says of guests' RAM.

    Attributes:
        unsound: why nothing can be concluded; empty if it can.
        entries: how often the processor entered a guest.
        guest_frames: frames that a guest touched.
        guest_accesses: accesses to RAM by guests.
        guest_upper_accesses: those of them by kernel-half addresses, which are the guests' own.
        host_accesses: accesses of the host's kernel to RAM, wherever, by kernel-half addresses.
        during, during_frames: accesses of the host's kernel to frames that a guest had touched before, up to the last
            instruction of the last guest, and how many such frames.
        early, early_frames: accesses of the host's kernel from the first guest's first instruction on, to frames that
            no guest had touched yet: memory that was cleared for a guest, or that the host used until then. A frame
            that was not named counts only if a guest touched it later.
        after: accesses to frames of guests after the last instruction of the last guest.
        sites: the instructions behind `during` and `after`, but for frames that no guest touched.
        early_sites: the instructions behind `early`.
        sites_lost: accesses by instructions that are missing in `sites`, which had no room for more.
    """

    unsound: str
    entries: int
    guest_frames: int
    guest_accesses: int
    guest_upper_accesses: int
    host_accesses: int
    during: int
    during_frames: int
    early: int
    early_frames: int
    after: int
    sites: tuple[Site, ...]
    early_sites: tuple[EarlySite, ...]
    sites_lost: int

    def headline(self) -> str:
        """Say it in one line."""
        if self.unsound:
            return f"the access log shows nothing: {self.unsound}"
        if not self.entries:
            return "the access log shows no guest"
        return (
            f"the host's kernel made {self.during} accesses to {self.during_frames} of the {self.guest_frames} frames "
            f"that guests had touched, {self.early} to frames that they touched later, {self.after} after their end"
        )


class Symbols:
    """The symbols of a running kernel, from its /proc/kallsyms."""

    def __init__(self, kallsyms: str) -> None:
        found = []
        for line in kallsyms.splitlines():
            words = line.split()
            if len(words) >= 3 and words[1] in "tTwW":
                found.append((int(words[0], 16), " ".join(words[2:])))
        found.sort()
        self._addresses = [address for address, _ in found]
        self._names = [name for _, name in found]

    def name(self, address: int) -> str:
        """Return ``function+0x12 [module]``, or an empty string for what lies before all symbols."""
        at = bisect.bisect_right(self._addresses, address) - 1
        if at < 0:
            return ""
        function, _, module = self._names[at].partition(" ")
        return f"{function}+{address - self._addresses[at]:#x} {module}".strip()


class _Start(NamedTuple):
    generation: int
    vmruns: int


class AccessLog:
    """The log of a host that runs, or has run.

    Args:
        path: the file that was given to `LabHost.start`.

    Raises:
        LabError: it is no such log.
    """

    def __init__(self, path: Path) -> None:
        try:
            data = np.memmap(path, mode="r+")
        except (OSError, ValueError) as error:
            raise LabError(f"cannot read the access log {path}: {error}", "start the host first") from error
        if data.size < PAGE_SIZE or data[: len(_MAGIC)].tobytes() != _MAGIC:
            raise LabError(f"{path} is no access log", "give the file that the host was started with")
        self._header = data[: _HEADER.itemsize].view(_HEADER)[0]
        if self._said("format") != _FORMAT:
            raise LabError(f"{path} is an access log of another version", "make it anew")
        table = PAGE_SIZE + self._said("sites") * _SITE.itemsize
        self._sites = data[PAGE_SIZE:table].view(_SITE)
        self._frames = data[table:].view(_FRAME)
        self._start = _Start(self._said("generation"), 0)

    def begin(self) -> None:
        """Forget what was counted for frames until now: a new guest is about to start, and none is running."""
        self._start = _Start(self._said("generation") + 1, self._said("vmruns"))
        self._header["generation"] = self._start.generation

    def guest_pfns(self) -> Pfns:
        """Return the page frame numbers that guests touched, ascending."""
        return self._pfns(np.nonzero(self._now()["guest"])[0])

    def report(self, symbols: Symbols | None = None, pfns: Iterable[int] = ()) -> AccessReport:
        """Say what happened since `begin`.

        Args:
            symbols: of the host's kernel.
            pfns: page frame numbers of guests' RAM, beside those that guests touched.
        """
        frames = self._now()
        touched = frames["guest"] > 0
        wanted = touched.copy()
        wanted[self._indexes(pfns)] = True
        until_end = np.where(wanted, self._during(frames), 0)
        during = np.where(touched, until_end, 0)
        early = np.where(touched, frames["early"], until_end)
        return AccessReport(
            unsound=self._unsound(),
            entries=self._said("vmruns") - self._start.vmruns,
            guest_frames=int(touched.sum()),
            guest_accesses=self._said("guest"),
            guest_upper_accesses=self._said("guest_upper"),
            host_accesses=self._said("host"),
            during=int(during.sum()),
            during_frames=int((during > 0).sum()),
            early=int(early.sum()),
            early_frames=int((early > 0).sum()),
            after=int((frames["during"] + frames["tail"])[wanted].sum() - until_end.sum()),
            sites=self._told_sites(symbols),
            early_sites=self._early_sites(frames, early, symbols),
            sites_lost=self._said("sites_lost"),
        )

    def _said(self, name: str) -> int:
        return int(self._header[name])

    def _now(self) -> "npt.NDArray[np.void]":
        """Return the entries of all frames; those of an earlier generation are empty."""
        frames = np.array(self._frames)
        frames[frames["generation"] != self._start.generation] = 0
        return frames

    def _during(self, entries: "npt.NDArray[np.void]") -> "npt.NDArray[np.uint64]":
        """Return how many accesses of each entry were made before the last entry into a guest.

        What follows the last entry is not told apart: the exit that ends a guest counts as the host's time after it.
        """
        earlier = np.where(entries["tail_vmrun"] < self._said("vmruns"), entries["tail"], 0)
        total: npt.NDArray[np.uint64] = entries["during"] + earlier.astype(np.uint64)
        return total

    def _unsound(self) -> str:
        if count := self._said("mismatches"):
            return f"host and guest were taken for each other {count} times"
        if count := self._said("lost"):
            return f"the frames of {count} accesses are not known"
        if self._said("vmruns") - self._said("vmexits") not in (0, 1):
            return "entries into guests and exits from them do not match"
        if not self._said("host"):
            return "no access of the host's kernel was seen at all"
        return ""

    def _told_sites(self, symbols: Symbols | None) -> tuple[Site, ...]:
        sites = np.array(self._sites)
        sites = sites[sites["rip"] != 0]
        during = self._during(sites)
        after = sites["during"] + sites["tail"] - during
        told = [
            Site(
                rip=int(site["rip"]),
                symbol=symbols.name(int(site["rip"])) if symbols else "",
                during=int(count),
                after=int(later),
                stores=int(site["stores"]),
                pa=int(self._pfns(np.array([site["frame"]], np.int64))[0]) * PAGE_SIZE + int(site["vaddr"]) % PAGE_SIZE,
                va=int(site["vaddr"]),
            )
            for site, count, later in zip(sites, during, after, strict=True)
        ]
        return tuple(sorted(told, key=lambda site: (-site.during, -site.after, site.rip)))

    def _early_sites(
        self, frames: "npt.NDArray[np.void]", early: "npt.NDArray[np.uint64]", symbols: Symbols | None
    ) -> tuple[EarlySite, ...]:
        rips = np.where(frames["guest"] > 0, frames["early_rip"], frames["rip"])
        told = []
        for rip in np.unique(rips[early > 0]):
            (of_it,) = np.nonzero((early > 0) & (rips == rip))
            told.append(
                EarlySite(
                    rip=int(rip),
                    symbol=symbols.name(int(rip)) if symbols else "",
                    frames=len(of_it),
                    accesses=int(early[of_it].sum()),
                    pa=int(self._pfns(of_it[:1])[0]) * PAGE_SIZE,
                )
            )
        return tuple(sorted(told, key=lambda site: -site.accesses))

    def _pfns(self, indexes: Pfns) -> Pfns:
        """Return the page frame numbers of the log's frames."""
        if len(self._frames) < _SPLIT:
            return indexes
        return np.where(indexes < _BELOW, indexes, indexes + _GAP)

    def _indexes(self, pfns: Iterable[int]) -> Pfns:
        """Return the log's frames of page frame numbers; those that are no RAM are left out."""
        wanted = np.fromiter(pfns, np.int64)
        if len(self._frames) >= _SPLIT:
            wanted = wanted[(wanted < _BELOW) | (wanted >= _BELOW + _GAP)]
            wanted = np.where(wanted < _BELOW, wanted, wanted - _GAP)
        return wanted[wanted < len(self._frames)]
