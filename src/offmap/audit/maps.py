"""/proc/PID/maps: a process's mappings (``fs/proc/task_mmu.c``, ``show_map_vma``)."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

_LINE = re.compile(
    r"(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?P<perms>[-r][-w][-x][sp]) (?P<offset>[0-9a-f]+) "
    r"(?P<device>[0-9a-f]+:[0-9a-f]+) (?P<inode>\d+)(?: +(?P<path>.*))?",
    re.DOTALL,
)


@dataclass(frozen=True)
class Mapping:
    """One line of maps: addresses [start, end), permissions, and what backs it from byte ``offset`` on."""

    start: int
    end: int
    perms: str
    offset: int
    device: str
    inode: int
    path: str

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def shared(self) -> bool:
        return self.perms[3] == "s"

    @property
    def writable(self) -> bool:
        return self.perms.startswith("rw")

    @property
    def anonymous(self) -> bool:
        """Private memory of no file (the heap, a stack, an anonymous mmap)."""
        return self.inode == 0 and not self.shared


def parse_maps(text: str) -> list[Mapping]:
    """The mappings of a maps file, in order of address; lines of another form (none are known) are left out."""
    found = []
    # The kernel escapes only the newline in a file's name: for splitlines() a carriage return in one would end the
    # line too, and a VMM could make up mappings.
    for line in text.split("\n"):
        match = _LINE.fullmatch(line)
        if match:
            found.append(
                Mapping(
                    int(match["start"], 16),
                    int(match["end"], 16),
                    match["perms"],
                    int(match["offset"], 16),
                    match["device"],
                    int(match["inode"]),
                    match["path"] or "",
                )
            )
    return found


def find_mapping(mappings: Iterable[Mapping], va: int) -> Mapping | None:
    """The mapping that holds this address, or None."""
    return next((mapping for mapping in mappings if mapping.start <= va < mapping.end), None)
