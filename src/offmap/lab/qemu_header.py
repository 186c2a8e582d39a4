"""The header that a TCG plugin is compiled against: qemu-plugin.h of the very QEMU that is to load it.

Debian has no package with it. It is taken from the source package that the installed QEMU was built from, which apt
downloads and checks against its signed index. A QEMU that was installed from source has it beside it.
"""

import json
import re
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from offmap.lab import apt
from offmap.lab.cache import cache_folder, locked, replace_folder, scratch_folder, sha256_of
from offmap.lab.errors import LabError
from offmap.lab.qemu import find_qemu, qemu_version

HEADER = "qemu-plugin.h"
_RECORD = "record.json"


@dataclass(frozen=True)
class QemuHeader:
    """A header, and which QEMU it belongs to.

    Attributes:
        version: of QEMU's source package, or what QEMU says itself.
        folder: what the compiler is to look in.
    """

    version: str
    folder: Path


def qemu_header() -> QemuHeader:
    """Return the header of the installed QEMU, downloading its source package unless that has been done.

    Raises:
        LabError: there is no such header to be had.
    """
    program = Path(find_qemu()).resolve()
    beside = program.parents[1] / "include"
    if (beside / HEADER).is_file():
        return QemuHeader(qemu_version(str(program)), beside)
    name, version = _source_package(program)
    store = cache_folder("qemu") / re.sub(r"[^\w.+~-]", "_", f"{name}_{version}")
    with locked(store.with_name(f"{store.name}.lock")):
        if not _intact(store):
            _download(name, version, store)
    return QemuHeader(version, store)


def _source_package(program: Path) -> tuple[str, str]:
    """Return name and version of the Debian source package that an installed program was built from."""
    failure = LabError(
        f"cannot get {HEADER}: {program} is of no Debian package",
        f"install QEMU from Debian, or with its headers ({program.parents[1] / 'include' / HEADER})",
    )
    try:
        owner = _dpkg_query("--search", str(program)).partition(": ")[0]
        words = _dpkg_query("--show", "--showformat", "${source:Package} ${source:Version}", owner).split()
    except OSError as error:
        raise failure from error
    if not owner or len(words) != 2:
        raise failure
    return words[0], words[1]


def _dpkg_query(*words: str) -> str:
    return subprocess.run(["dpkg-query", *words], capture_output=True, text=True, check=False).stdout


def _intact(store: Path) -> bool:
    try:
        return bool(json.loads((store / _RECORD).read_text())["sha256"] == sha256_of(store / HEADER))
    except (OSError, ValueError, TypeError, KeyError):
        return False  # absent or damaged: download it


def _download(name: str, version: str, store: Path) -> None:
    view = apt.source_view(cache_folder("apt"))
    view.update()
    with scratch_folder(store) as scratch:
        # apt checks every file against its signed index; what is downloaded is read here and kept nowhere.
        view.run("apt-get", "source", "--download-only", "--only-source", f"{name}={version}", cwd=scratch)
        tars = sorted(path for path in scratch.iterdir() if ".tar." in path.name and not path.name.endswith(".asc"))
        header = _find_header(tars)
        new = scratch / "new"
        new.mkdir()
        (new / HEADER).write_bytes(header)
        (new / _RECORD).write_text(json.dumps({"sha256": sha256_of(new / HEADER)}))
        replace_folder(new, store)


def _find_header(tars: list[Path]) -> bytes:
    """Return the header out of a source package's tarballs.

    Raises:
        LabError: it is not there, or the distribution has changed it.
    """
    found = b""
    for tar in tars:
        for path, data in _members(tar):
            if path.name == HEADER:
                found = data
            elif re.search(rb"^\+\+\+ \S*/qemu-plugin\.h\s", data, re.MULTILINE):
                raise LabError(
                    f"{HEADER} is changed by {path.name} of QEMU's source package, which is not applied here",
                    "install QEMU with its headers",
                )
    if not found:
        raise LabError(f"QEMU's source package holds no {HEADER}", "use a QEMU of 4.2 or newer")
    return found


def _members(tar: Path) -> Iterator[tuple[Path, bytes]]:
    """Yield the header and the distribution's patches from one tarball."""
    try:
        with tarfile.open(tar) as archive:
            for member in archive:
                path = Path(member.name)
                if member.isfile() and (path.name == HEADER or path.parts[:2] == ("debian", "patches")):
                    file = archive.extractfile(member)
                    yield path, file.read() if file else b""
    except (OSError, tarfile.TarError) as error:
        raise LabError(f"cannot read {tar.name} of QEMU's source package: {error}", "try again") from error
