"""A Debian kernel's source: the package linux-source-SERIES, fetched once, unpacked where it is wanted."""

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from offmap.lab import apt
from offmap.lab.cache import cache_folder, locked, replace_folder, scratch_folder, sha256_of
from offmap.lab.errors import LabError

_RECORD = "package.json"
# What tar says when a wanted part is not there.
_HARMLESS = (": Not found in archive", ": Exiting with failure status due to previous errors")


@dataclass(frozen=True)
class KernelSource:
    """A verified source package in the cache.

    Attributes:
        version: Debian's, ``7.3.4-1~bpo13+1``.
        deb: the package.
    """

    version: str
    deb: Path

    def unpack(self, folder: Path, parts: Sequence[str] = ()) -> None:
        """Unpack the kernel's source tree so that `folder`, which must exist, is its top.

        Args:
            parts: the files and folders to unpack, relative to the top, with wildcards; all by default. What this
                source does not have is left out.

        Raises:
            LabError: it cannot be unpacked.
        """
        wanted = ["--wildcards", "--no-wildcards-match-slash", *(f"*/{part}" for part in parts)] if parts else []
        # The package holds little but one tarball, which is large: no detour by a file.
        with (
            subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(self.deb)], stdout=subprocess.PIPE) as package,
            subprocess.Popen(
                ["tar", "-xO", "--wildcards", "./usr/src/linux-source-*.tar.xz"],
                stdin=package.stdout,
                stdout=subprocess.PIPE,
            ) as tarball,
        ):
            done = subprocess.run(
                # On all processors: the tarball is compressed in blocks.
                ["tar", "-I", "xz -T0", "-x", "-C", str(folder), "--strip-components=1", "--no-same-owner", *wanted],
                stdin=tarball.stdout,
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, "LC_ALL": "C"},
            )
        said = done.stderr.strip().splitlines()
        if parts:
            said = [line for line in said if not line.endswith(_HARMLESS)]
        if (done.returncode != 0 and (said or not parts)) or not (folder / "Kbuild").is_file():
            reason = (said or ["it holds no kernel source"])[-1]
            raise LabError(f"cannot unpack {self.deb.name}: {reason}", "check that the cache folder's disk is not full")


def kernel_source(series: str) -> KernelSource:
    """Find the source of Debian's `series` (``7.3``) in the cache, or download the newest.

    Raises:
        LabError: there is none to be had.
    """
    store = cache_folder("sources") / f"linux-source-{series}"
    with locked(store.with_name(f"{store.name}.lock")):
        try:
            record = json.loads((store / _RECORD).read_text())
            source = KernelSource(record["version"], store / record["file"])
            if sha256_of(source.deb) == record["sha256"]:
                return source
        except (OSError, ValueError, TypeError, KeyError):
            pass  # absent or damaged: download it
        return _download(series, store)


def _download(series: str, store: Path) -> KernelSource:
    if not apt.have_apt() or shutil.which("xz") is None:
        raise LabError(
            f"cannot get the source of Debian's kernel {series}: this machine has no apt-get, dpkg-deb or xz",
            "use a machine that has, and copy its cache folder",
        )
    name = f"linux-source-{series}"
    for leftover in store.parent.glob(f".{store.name}.*"):  # of a run that was killed; we hold the lock
        shutil.rmtree(leftover, ignore_errors=True)

    def fetch(view: apt.AptView) -> KernelSource | None:
        package = apt.newest(apt.parse_packages(view.run("apt-cache", "show", "--all-versions", name)))
        if package is None:
            return None
        with scratch_folder(store) as scratch:
            deb = apt.download(view, package, scratch)
            record = {"version": package.version, "file": deb.name, "sha256": package.sha256}
            (scratch / _RECORD).write_text(json.dumps(record))
            replace_folder(scratch, store)
        return KernelSource(package.version, store / deb.name)

    return apt.from_views(name, series, fetch, "check the network")
