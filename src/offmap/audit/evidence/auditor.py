"""The auditor's own digest: which program made the verdict."""

import hashlib
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import offmap
from offmap.audit.evidence.statement import Auditor

_LIBRARIES = ("numpy", "msgspec")  # they read the page tables and make the result


def auditor() -> Auditor:
    """Describe this program."""
    return Auditor(
        version=offmap.__version__,
        digest=folder_digest(Path(offmap.__file__).parent),
        python=platform.python_version(),
        python_digest=hashlib.sha256(Path(sys.executable).resolve().read_bytes()).hexdigest(),
        libraries={name: version(name) for name in _LIBRARIES},
    )


def folder_digest(folder: Path) -> str:
    """SHA-256 of the list that ``sha256sum`` prints of the folder's files, sorted by name, without compiled ones.

    The same as: cd FOLDER; find . -type f ! -path '*/__pycache__/*' | sed s,./,, | LC_ALL=C sort | xargs sha256sum |
    sha256sum.
    """
    files = {
        path.relative_to(folder).as_posix().encode(): path
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    lines = [
        b"%s  %s\n" % (hashlib.sha256(files[name].read_bytes()).hexdigest().encode(), name) for name in sorted(files)
    ]
    return hashlib.sha256(b"".join(lines)).hexdigest()
