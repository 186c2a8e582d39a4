"""Getting a host kernel: a Debian one by download, or one that is already on this machine.

``debian:SERIES`` is downloaded with apt, checked against apt's signed index, and unpacked below the cache folder; it is
not installed. The cache is checked at each use, never trusted: what the lab is going to boot or load must match the
manifest made when the (verified) package was unpacked, else the package is unpacked, or downloaded, again.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from offmap.lab import apt
from offmap.lab.cache import cache_folder, locked, replace_folder, scratch_folder, sha256_of, write_atomically
from offmap.lab.errors import LabError
from offmap.lab.kernel import HostKernel, image_release

__all__ = ["DEFAULT_SERIES", "damaged", "default_spec", "host_kernel", "write_manifest"]

DEFAULT_SERIES = "6.12"
MANIFEST = "manifest.json"  # {"sha256": {relative path: digest}}
RECORD = "package.json"  # what the manifest was made from: name, version, sha256 of the .deb
ELSEWHERE = "give --host-kernel FILE (a bzImage; --modules DIR for its modules), or --host-kernel running"


def default_spec() -> str:
    """Return the kernel to use where none is named: Debian's where apt is, else the running one."""
    return f"debian:{DEFAULT_SERIES}" if apt.have_apt() else "running"


def host_kernel(spec: str | None = None, modules: Path | None = None) -> HostKernel:
    """Find or download the kernel that ``spec`` names; with a warm cache this needs no network.

    Args:
        spec: ``debian:6.12`` (any series that Debian has), ``running``, or the path of a bzImage.
        modules: its ``lib/modules/RELEASE`` folder, for a path; looked for around it by default.

    Raises:
        LabError: there is no such kernel, or it could not be downloaded or read.
    """
    spec = spec or default_spec()
    if spec == "running":
        return _running(modules)
    if spec.startswith("debian:"):
        series = spec.removeprefix("debian:")
        if not re.fullmatch(r"\d+\.\d+", series):
            raise LabError(f"{spec} names no kernel series", "write it as debian:6.12")
        return _debian(spec, series)
    image = Path(spec).absolute()
    release = image_release(image)
    return HostKernel(spec, release, image, modules.absolute() if modules else _modules_near(image, release))


def _modules_near(image: Path, release: str) -> Path:
    candidates = [image.parent / "lib/modules" / release, image.parent.parent / "lib/modules" / release]
    installed = Path("/lib/modules") / release
    return next((folder for folder in [*candidates, installed] if folder.is_dir()), installed)


def _running(modules: Path | None) -> HostKernel:
    release = os.uname().release
    image = Path(f"/boot/vmlinuz-{release}")
    folder = modules or Path("/lib/modules") / release
    if not os.access(image, os.R_OK):
        why = "is not readable" if image.exists() else "does not exist"
        raise LabError(
            f"cannot use the running kernel: {image} {why}",
            "give --host-kernel FILE (a bzImage; --modules DIR for its modules)",
        )
    return HostKernel("running", image_release(image), image, folder)


def _debian(spec: str, series: str) -> HostKernel:
    store = cache_folder("kernels") / f"debian-{series}"
    with locked(store.with_name(f"{store.name}.lock")):
        tree = store / "tree"
        if damaged(tree):
            if not apt.have_apt():
                raise LabError(f"cannot download {spec}: this machine has no apt-get and dpkg-deb", ELSEWHERE)
            store.mkdir(exist_ok=True)
            for leftover in store.glob(".*"):  # of a run that was killed; we hold the lock
                shutil.rmtree(leftover)
            _unpack(_package_file(series, store), tree)
        release = _release(tree)
    return HostKernel(spec, release, tree / "boot" / f"vmlinuz-{release}", tree / "lib/modules" / release)


def _package_file(series: str, store: Path) -> Path:
    """Return the verified .deb of ``store``, downloading it if it is absent or not what was recorded."""
    deb, record = store / "image.deb", store / RECORD
    try:
        recorded = json.loads(record.read_text())["sha256"]
        if deb.is_file() and sha256_of(deb) == recorded:
            return deb
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no record, or half of one: download again
    failures = []
    for view in apt.views(series, cache_folder("apt")):
        try:
            view.update()
            package = apt.find_kernel(view, series)
            if package is None:
                failures.append(f"{view.label} have none")
                continue
            with scratch_folder(deb) as scratch:
                apt.download(view, package, scratch).replace(deb)
            write_atomically(record, json.dumps(vars(package)).encode())
            return deb
        except LabError as error:
            failures.append(f"{view.label}: {error.what}")
    raise LabError(f"cannot get a Debian {series} kernel: {'; '.join(failures)}", f"check the network, or {ELSEWHERE}")


def _unpack(deb: Path, tree: Path) -> None:
    """Unpack the image, its configuration and its modules to ``tree``, index the modules, and write the manifest."""
    with scratch_folder(tree) as scratch:
        raw, new = scratch / "raw", scratch / "new"
        _run("dpkg-deb", "-x", str(deb), str(raw))
        (new / "lib").mkdir(parents=True)
        (raw / "boot").rename(new / "boot")
        # Since trixie the modules are packaged below /usr/lib.
        found = next((folder for folder in (raw / "lib/modules", raw / "usr/lib/modules") if folder.is_dir()), None)
        if found is None:
            raise LabError(f"the package {deb} holds no kernel modules", "remove it from the cache and try again")
        found.rename(new / "lib/modules")
        release = _release(new)
        # Some builds of kmod look below usr/lib only.
        (new / "usr").mkdir()
        (new / "usr/lib").symlink_to("../lib")
        _run("depmod", "-b", str(new), release)
        write_manifest(new, used_files(new, release))
        replace_folder(new, tree)


def _release(tree: Path) -> str:
    names = sorted(path.name for path in (tree / "lib/modules").iterdir())
    if len(names) != 1:
        raise LabError(f"{tree} holds {len(names)} kernels where one was expected", "remove it and try again")
    return names[0]


def used_files(tree: Path, release: str) -> list[Path]:
    """List the files that matter: the image, its configuration, the module index and every module."""
    modules = tree / "lib/modules" / release
    boot = [tree / "boot" / f"{name}-{release}" for name in ("vmlinuz", "config")]
    return [*boot, *sorted(modules.glob("modules.*")), *sorted(modules.rglob("*.ko*"))]


def write_manifest(tree: Path, files: Iterable[Path]) -> None:
    """Record the digests of ``files`` below ``tree``."""
    digests = {str(path.relative_to(tree)): sha256_of(path) for path in files}
    (tree / MANIFEST).write_text(json.dumps({"sha256": digests}))


def damaged(tree: Path) -> str:
    """Say what is wrong with an unpacked tree, or return an empty string."""
    try:
        digests = json.loads((tree / MANIFEST).read_text())["sha256"]
        if not digests:
            return "empty manifest"
        for name, digest in digests.items():
            if sha256_of(tree / name) != digest:
                return f"{name} was changed"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"unreadable: {error}"
    return ""


def _run(*argv: str) -> None:
    # depmod is in a folder that users do not have in their PATH.
    program = shutil.which(argv[0], path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if program is None:
        raise LabError(f"no {argv[0]} command", f"install {'kmod' if argv[0] == 'depmod' else 'dpkg'}")
    done = subprocess.run([program, *argv[1:]], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise LabError(f"{argv[0]} failed: {reason}", "check that the cache folder's disk is not full")
