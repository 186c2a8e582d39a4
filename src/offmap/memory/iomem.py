"""What physical memory is: /proc/iomem, the ``memmap=`` of the host's command line, the firmware's own map.

Pure functions over the text of these files.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator

from offmap.errors import OffmapError
from offmap.typed import NamedTuple
from offmap.units import parse_size


class PhysicalRange(NamedTuple):
    """Physical addresses from `start` up to, not including, `end`."""

    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start

    def aligned(self, page_size: int) -> "PhysicalRange":
        """The whole pages inside it (empty where there is none)."""
        start = -(-self.start // page_size) * page_size
        return PhysicalRange(start, max(start, self.end // page_size * page_size))


_HEX = frozenset("0123456789abcdef")


def _resources(text: str) -> Iterator[tuple[bool, PhysicalRange, str]]:
    """Of each line of /proc/iomem: is it a top-level resource, where it is, its name."""
    for line in text.splitlines():
        place, colon, name = line.partition(" : ")
        start, dash, last = place.lstrip(" ").partition("-")
        if colon and dash and not {*start, *last} - _HEX and start and last:
            yield place[0] != " ", PhysicalRange(int(start, 16), int(last, 16) + 1), name


def parse_iomem(text: str, name: str) -> list[PhysicalRange]:
    """The top-level resources called `name` in the text of /proc/iomem.

    Raises:
        OffmapError: every address is 0, as the kernel shows them to a process without CAP_SYS_ADMIN.
    """
    resources = list(_resources(text))
    if text and not any(place.end > 1 for _, place, _ in resources):
        raise OffmapError("/proc/iomem shows no addresses to this user", "run as root (CAP_SYS_ADMIN)")
    return [place for top_level, place, called in resources if top_level and called == name]


def memmap_reservations(command_line: str) -> list[PhysicalRange]:
    """The ranges that ``memmap=nn$ss`` on a kernel command line reserves (admin-guide/kernel-parameters)."""
    ranges = []
    for word in command_line.split():
        key, _, value = word.partition("=")
        if key != "memmap":
            continue
        for item in value.split(","):
            size, dollar, start = item.partition("$")
            if not dollar:
                continue  # nn@ss, nn#ss, nn!ss and exactmap mean other things
            try:
                ranges.append(PhysicalRange(parse_size(start), parse_size(start) + parse_size(size)))
            except OffmapError:
                continue  # the kernel ignored it too
    return ranges


def suggest_reservation(iomem: str) -> PhysicalRange | None:
    """A range worth reserving for guests on the host whose /proc/iomem this is; None where there is none.

    A quarter of the largest stretch of System RAM (256 MiB to 16 GiB, a power of two), at its top, aligned so that huge
    pages could map it. The kernel image's place is no obstacle: KASLR avoids what ``memmap=`` reserves. A crash
    kernel's place is.
    """
    crash = [place for _, place, name in _resources(iomem) if name == "Crash kernel"]
    legacy = PhysicalRange(0, 1 << 24)  # firmware, and the DMA zone
    largest = max(subtract(parse_iomem(iomem, "System RAM"), [legacy, *crash]), key=lambda r: r.size, default=None)
    if largest is None:
        return None
    quarter = 1 << max((largest.size // 4).bit_length() - 1, 0)
    size = min(max(quarter, 256 << 20), 16 << 30)
    alignment = min(size, 1 << 30)
    start = (largest.end - size) // alignment * alignment
    return PhysicalRange(start, start + size) if start >= largest.start else None


def intersect(left: Iterable[PhysicalRange], right: Iterable[PhysicalRange]) -> list[PhysicalRange]:
    """What is in both, in order."""
    right = list(right)

    def pieces() -> Iterator[PhysicalRange]:
        for a in left:
            for b in right:
                start, end = max(a.start, b.start), min(a.end, b.end)
                if start < end:
                    yield PhysicalRange(start, end)

    return sorted(pieces())


def subtract(ranges: Iterable[PhysicalRange], taken: Iterable[PhysicalRange]) -> list[PhysicalRange]:
    """What is in `ranges` and not in `taken`, in order."""
    away = merged(t for t in taken if t.size > 0)
    rest: set[PhysicalRange] = set()
    for r in ranges:
        start = r.start
        for t in away[bisect_right(away, r.start, key=lambda t: t.end) :]:
            if t.start >= r.end:
                break
            if start < t.start:
                rest.add(PhysicalRange(start, t.start))
            start = t.end
        if start < r.end:
            rest.add(PhysicalRange(start, r.end))
    return sorted(rest)


def merged(ranges: Iterable[PhysicalRange]) -> list[PhysicalRange]:
    """The same addresses in as few ranges as can be, in order."""
    result: list[PhysicalRange] = []
    for r in sorted(ranges):
        if result and r.start <= result[-1].end:
            result[-1] = PhysicalRange(result[-1].start, max(result[-1].end, r.end))
        else:
            result.append(r)
    return result
