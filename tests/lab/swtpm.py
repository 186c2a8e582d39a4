"""A TPM in software and tpm2-tools for a disposable host: downloaded and unpacked, never installed."""

import json
import subprocess
from pathlib import Path

from offmap.lab import apt
from offmap.lab.cache import cache_folder, locked, replace_folder, scratch_folder, sha256_of

__all__ = ["ENVIRONMENT", "SCRIPT", "tpm_root"]

SCRIPT = Path(__file__).with_name("swtpm.sh")
ENVIRONMENT = ("env", "PATH=/tmp/tpm/bin:/usr/bin:/bin:/usr/sbin:/sbin", "TPM2TOOLS_TCTI=swtpm:path=/tmp/tpm/sock")
"""What a command in the host needs in front of it, once SCRIPT has run there."""

_PACKAGES = ("swtpm", "tpm2-tools")
_COMPLETE = "packages.json"


def tpm_root() -> Path:
    """Unpack the packages and all that they depend on, unless that has been done; give the folder.

    They are of this machine's own release: its C library runs them.
    """
    store = cache_folder() / "swtpm"
    with locked(store.with_name(f"{store.name}.lock")):
        if not (store / _COMPLETE).is_file():
            apt.from_views("swtpm", "6.1", lambda view: _provide(view, store), "check the machine's apt sources")
    return store


def _provide(view: apt.AptView, store: Path) -> Path:
    with scratch_folder(store) as scratch:
        debs = apt.download_closure(view, _PACKAGES, scratch)
        root = scratch / "root"
        root.mkdir()
        for deb in debs:
            subprocess.run(["dpkg-deb", "-x", str(deb), str(root)], check=True)
        (root / _COMPLETE).write_text(json.dumps({deb.name: sha256_of(deb) for deb in debs}))
        replace_folder(root, store)
    return store
