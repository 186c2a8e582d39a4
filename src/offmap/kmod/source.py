"""The module's sources, in a checkout or in an installed package, and their digest."""

import hashlib
from pathlib import Path

from offmap.lab.installed import shipped

MODULE = "offmap"
_KINDS = (".c", ".h")
_BUILD_FILES = ("Kbuild", "Makefile")


def source_folder() -> Path:
    """The folder of the module's sources. Raises LabError if this installation has none."""
    return shipped("kernel/module", "_kernel_module", "Kbuild")


def types_folder() -> Path:
    """The folder of the program that says what a kernel's structures are like. Raises LabError if there is none."""
    return shipped("kernel/types", "_kernel_types", "Kbuild")


def _sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in _KINDS or path.name in _BUILD_FILES)


def source_hash(folder: Path) -> str:
    """A digest of all the sources: sixteen hexadecimal digits."""
    digest = hashlib.sha256()
    for path in _sources(folder):
        data = path.read_bytes()
        digest.update(f"{path.name} {len(data)}\n".encode() + data)
    return digest.hexdigest()[:16]


def copy_sources(folder: Path, to: Path) -> None:
    """Copy the sources, without the files that a build may have left there."""
    to.mkdir(parents=True, exist_ok=True)
    for path in _sources(folder):
        (to / path.name).write_bytes(path.read_bytes())
