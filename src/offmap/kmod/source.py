"""The module's sources, in a checkout or in an installed package, and their digest."""

import hashlib
from pathlib import Path

import offmap
from offmap.errors import OffmapError

MODULE = "offmap"
_PACKAGED = "_kernel_module"  # pyproject.toml puts kernel/module there when it makes a wheel
_KINDS = (".c", ".h")
_BUILD_FILES = ("Kbuild", "Makefile")


def source_folder() -> Path:
    """The folder of the module's sources. Raises OffmapError if this installation has none."""
    package = Path(offmap.__file__).parent
    for folder in (package / _PACKAGED, package.parents[1] / "kernel/module"):
        if (folder / "Kbuild").is_file():
            return folder
    raise OffmapError("this installation of offmap holds no sources of its kernel module", "install offmap again")


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
