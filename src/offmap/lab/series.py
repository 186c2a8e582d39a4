"""offmap's kernel patches, by the kernel series that they are made for, and the configuration to build with them."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from offmap.lab.errors import LabError
from offmap.lab.installed import shipped

# What no kernel is compiled from. Patches to these leave a built kernel as good as new.
_NOT_BUILT = (b"Documentation/", b"MAINTAINERS", b"tools/testing/")
_SUBJECT = re.compile(r"^Subject: (?:\[PATCH[^\]]*\] )?(.*(?:\n .*)*)", re.MULTILINE)


@dataclass(frozen=True)
class PatchSeries:
    """What turns a Debian kernel into one of ours.

    Attributes:
        name: the kernel series, ``7.3``.
        patches: in the order in which they apply.
        config: a Kconfig fragment: what is not named in it is off.
        debug: another, of a kernel that looks for its own mistakes; None: of one that does not.
    """

    name: str
    patches: tuple[Path, ...]
    config: Path
    debug: Path | None = None

    @property
    def spec(self) -> str:
        """How a user asks for the kernel: ``patched:7.3``, ``patched:7.3+debug``."""
        return f"patched:{self.name}{'+debug' if self.debug else ''}"

    def configs(self) -> list[Path]:
        """The Kconfig fragments, which add up."""
        return [self.config, *([self.debug] if self.debug else [])]

    def key(self, source_version: str) -> str:
        """Sixteen hexadecimal digits that change with the source, the configuration, and what patches do to it."""
        digest = hashlib.sha256(f"{source_version}\n".encode())
        parts = [path.read_bytes() for path in self.configs()] + [_changes(path) for path in self.patches]
        for data in parts:
            if data:
                digest.update(f"{len(data)}\n".encode() + data)
        return digest.hexdigest()[:16]

    def subjects(self) -> list[str]:
        """The patches' subjects, in order."""
        return [_subject(path) for path in self.patches]


def _files(patch: Path) -> list[bytes]:
    """What `patch` does to each file; each begins with the file's name."""
    return re.split(rb"^diff --git a/", patch.read_bytes(), flags=re.MULTILINE)[1:]


def _changes(patch: Path) -> bytes:
    """What `patch` does to the files that a kernel is compiled from: no message, no test, no documentation."""
    return b"".join(file for file in _files(patch) if not file.startswith(_NOT_BUILT))


def changes_below(patch: Path, folders: Sequence[str]) -> bytes:
    """What `patch` does to the files in these folders (each ends with a slash), as a patch; empty if nothing."""
    prefixes = tuple(folder.encode() for folder in folders)
    return b"".join(b"diff --git a/" + file for file in _files(patch) if file.startswith(prefixes))


def _subject(patch: Path) -> str:
    match = _SUBJECT.search(patch.read_text())
    return " ".join(match[1].split()) if match else patch.name


def all_series() -> Iterator[PatchSeries]:
    """Yield each series that offmap has. Raises LabError: this installation has none at all."""
    folder = shipped("kernel", "_kernel", "lab.config")
    for patches in sorted((folder / "patches").iterdir()):
        if patches.is_dir():
            series = PatchSeries(patches.name, tuple(sorted(patches.glob("*.patch"))), folder / "lab.config")
            yield series
            yield replace(series, debug=folder / "debug.config")


def newest_series() -> PatchSeries:
    """The series for the newest kernel, without its debugging. Raises LabError: this installation has none at all."""
    plain = (series for series in all_series() if series.debug is None)
    return max(plain, key=lambda series: [int(part) for part in series.name.split(".")])


def patch_series(spec: str) -> PatchSeries:
    """The series that `spec` (``patched:7.3``) asks for. Raises LabError: there is no such series."""
    known = {series.spec: series for series in all_series()}
    if spec not in known:
        raise LabError(f"offmap has no patches for {spec}", f"choose {' or '.join(known)}")
    return known[spec]


def config_options(fragment: str) -> dict[str, str]:
    """The options that a Kconfig fragment sets: ``{"CONFIG_KVM": "y"}``."""
    pairs = (line.split("=", 1) for line in fragment.splitlines() if line.startswith("CONFIG_") and "=" in line)
    return {name: value.strip() for name, value in pairs}


def missing_options(wanted: str, config: str) -> Sequence[str]:
    """The lines of the fragment `wanted` that a finished `.config` does not have as they are."""
    have = config_options(config)
    return [f"{name}={value}" for name, value in config_options(wanted).items() if have.get(name, "n") != value]
