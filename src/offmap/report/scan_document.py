"""The parts of an audit's JSON that say where secrets were read, and what a second opinion was (see ``document``)."""

from dataclasses import dataclass

from offmap.report.decode import Address

__all__ = ["Oracle", "Owner", "Place", "Scan"]


@dataclass(frozen=True)
class PageProcess:
    """A process that has a page in its page tables."""

    pid: int
    process: str
    va: Address


@dataclass(frozen=True)
class Owner:
    """audit.placed.Owner: what a page is, and whose."""

    sort: str
    name: str = ""
    file_offset: int | None = None
    processes: tuple[PageProcess, ...] = ()
    guest_phys_addr: Address | None = None
    userspace_addr: Address | None = None

    def __str__(self) -> str:
        words = SORT_NAMES.get(self.sort, self.sort.replace("_", " "))
        if self.guest_phys_addr is not None:
            words += f" at guest-physical {self.guest_phys_addr:#x}"
        elif self.userspace_addr is not None:
            words += f" at {self.userspace_addr:#x} of the process"
        if self.name:
            words += f" of {self.name}"
        if self.file_offset is not None:
            words += f", byte {self.file_offset:#x}"
        if self.processes:
            words += ", in " + ", ".join(f"{each.process} ({each.pid})" for each in self.processes[:4])
            words += " and others" if len(self.processes) > 4 else ""
        return words


SORT_NAMES = {
    "guest": "the VM's own page",
    "process": "process memory",
    "free": "free page",
    "kernel": "kernel page",
    "reserved": "reserved page",
    "gone": "gone at a second look",
}
"""audit.placed.Sort for people, where its own word does not do."""


@dataclass(frozen=True)
class Place:
    """audit.scan.Place: where a secret was read."""

    va: Address
    pa: Address
    region: str
    in_guest: bool
    owner: Owner | None = None
    source: bool = False

    @property
    def said_owner(self) -> str:
        """What the page is."""
        if self.owner is not None:
            return str(self.owner) + (" (where the secret was read from)" if self.source else "")
        return SORT_NAMES["guest"] if self.in_guest else "not a guest page"


@dataclass(frozen=True)
class Found:
    """A canary that was read."""

    canary: int
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Scan:
    """audit.scan.ScanResult: a scan of all that the kernel has mapped, for canaries or for one secret."""

    canaries_found: int | None
    bytes_scanned: int
    bytes_unread: int
    frames_unread: int
    seconds: float
    found: tuple[Found, ...]
    secret_bytes: int | None = None
    places: tuple[Place, ...] = ()

    @property
    def count(self) -> str:
        """What was found, in words."""
        if self.secret_bytes is not None:
            return f"the secret at {len(self.places)} place{'' if len(self.places) == 1 else 's'}"
        number = len(self.found)
        return f"{number} {'canary' if number == 1 else 'canaries'}"


@dataclass(frozen=True)
class Oracle:
    """audit.oracle.OracleResult: a second opinion, which agreed."""

    name: str
    version: str
    seed: int
    pages: int
    frames_agreed: int
    frames_unasked: int
    addresses: int
    mapped: int
    unmapped: int
    retried: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.name} {self.version} agrees on the frames of {self.frames_agreed:,} of {self.pages:,} guest pages "
            f"drawn at random, and on {self.addresses:,} kernel addresses "
            f"({self.mapped:,} mapped, {self.unmapped:,} not)"
        )
