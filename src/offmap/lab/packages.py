"""Debian packages that a disposable host needs: downloaded and unpacked into the cache, never installed here.

apt checks each of them against its signed index.
"""

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from offmap.lab import apt
from offmap.lab.cache import cache_folder, locked, replace_folder, scratch_folder, sha256_of
from offmap.lab.errors import LabError

COMPLETE = "packages.json"
"""In a folder of unpacked packages: their digests. It is written last."""

_SERIES = "6.1"  # its suites are those of the machine's own release, whose C library runs the programs


def unpacked(name: str, packages: Sequence[str]) -> Path:
    """Unpack packages and all that they depend on into the cache, as `name`, unless they are there; return the folder.

    Raises:
        LabError: they cannot be had.
    """
    store = cache_folder() / name
    with locked(store.with_name(f"{store.name}.lock")):
        if not (store / COMPLETE).is_file():
            if not apt.have_apt():
                raise LabError(f"cannot get {packages[0]}: there is no apt-get and dpkg-deb", "use a Debian machine")
            provide(store, packages, _SERIES, _unpack, "check the machine's apt sources")
    return store


def provide(
    store: Path, packages: Sequence[str], series: str, unpack: Callable[[Sequence[Path], Path], None], remedy: str
) -> None:
    """Download packages and all that they depend on, and unpack them to `store`, whole or not at all.

    Args:
        series: of the kernel in whose Debian release they are looked for, if the machine's own has none.
        unpack: takes the files, and the empty folder that they go to.

    Raises:
        LabError: they cannot be had; says the remedy.
    """

    def fetch(view: apt.AptView) -> Path:
        with scratch_folder(store) as scratch:
            debs = apt.download_closure(view, packages, scratch)
            root = scratch / "root"
            root.mkdir()
            unpack(debs, root)
            (root / COMPLETE).write_text(json.dumps({deb.name: sha256_of(deb) for deb in debs}))
            replace_folder(root, store)
        return store

    apt.from_views(packages[0], series, fetch, remedy)


def _unpack(debs: Sequence[Path], root: Path) -> None:
    for deb in debs:
        done = subprocess.run(["dpkg-deb", "-x", str(deb), str(root)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise LabError(f"cannot unpack {deb.name}: {done.stderr.strip()}", "check that the disk is not full")
