"""What an image is made of. Two images of one recipe differ only in the time they were made."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from offmap.errors import OffmapError
from offmap.units import format_size

FORMAT = 2
"""Goes up with each change to how a root file system is made, so that older ones in the cache are not used."""

PACKAGES = ("systemd-sysv", "udev", "iproute2", "busybox")
"""Packages beside Debian's minimal set: init, device nodes, network tools, and busybox (wget, nc, vi and others)."""

MIN_SIZE = 512 << 20  # what the packages above need, with room to breathe


@dataclass(frozen=True, slots=True)
class RootRecipe:
    """A root file system.

    Attributes:
        release: of Debian, by its code name.
        include: packages beside PACKAGES.
        size: of the file system in bytes; what is not used is a hole in its file.
        autologin: the console gives a root shell without asking for a name.
        hostname: its name; DHCP may give it another.

    Raises:
        OffmapError: a name that Debian could not have given, or too small a size.
    """

    release: str = "bookworm"
    include: Sequence[str] = ()
    size: int = 2 << 30
    autologin: bool = False
    hostname: str = "debian"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]{2,20}", self.release):
            raise OffmapError(f"{self.release!r} names no Debian release", "write it as bookworm")
        for name in self.include:
            if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", name):  # Debian Policy, 5.6.7
                raise OffmapError(f"{name!r} is no package name", "give --include a list like curl,gcc")
        if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?", self.hostname):
            raise OffmapError(f"{self.hostname!r} is no host name", "use letters, digits and hyphens")
        if self.size < MIN_SIZE or self.size % (1 << 20):
            raise OffmapError(
                f"a Debian root file system cannot have {format_size(self.size)}",
                f"give --size whole MiB, at least {format_size(MIN_SIZE)}",
            )

    @property
    def key(self) -> str:
        """A name for the cache: the release, and a digest of everything."""
        facts = {**asdict(self), "include": sorted(set(self.include)), "packages": PACKAGES, "format": FORMAT}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return f"{self.release}-{digest[:16]}"
