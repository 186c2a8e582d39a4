"""Debian packages for programs that run in a disposable host: downloaded and unpacked, never installed."""

import json
import subprocess
from pathlib import Path

from offmap.lab import apt
from offmap.lab.cache import cache_folder, locked, replace_folder, scratch_folder, sha256_of

__all__ = ["unpacked"]

_COMPLETE = "packages.json"


def unpacked(name: str, packages: tuple[str, ...]) -> Path:
    """Unpack packages and all that they depend on into the cache, as `name`, unless they are there; give the folder.

    They are of this machine's own release: its C library runs them.
    """
    store = cache_folder() / name
    with locked(store.with_name(f"{store.name}.lock")):
        if not (store / _COMPLETE).is_file():
            remedy = "check the machine's apt sources"
            apt.from_views(packages[0], "6.1", lambda view: _provide(view, packages, store), remedy)
    return store


def _provide(view: apt.AptView, packages: tuple[str, ...], store: Path) -> Path:
    with scratch_folder(store) as scratch:
        debs = apt.download_closure(view, packages, scratch)
        root = scratch / "root"
        root.mkdir()
        for deb in debs:
            subprocess.run(["dpkg-deb", "-x", str(deb), str(root)], check=True)
        (root / _COMPLETE).write_text(json.dumps({deb.name: sha256_of(deb) for deb in debs}))
        replace_folder(root, store)
    return store
