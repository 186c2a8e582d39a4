"""Getting a host kernel: a Debian one by download, one that is already on this machine, or one built with our patches.

``debian:SERIES`` is downloaded with apt, checked against apt's signed index, and unpacked below the cache folder; it is
not installed. The cache is checked at each use, never trusted: what the lab is going to boot or load must match the
manifest made when the (verified) package was unpacked, else the package is unpacked, or downloaded, again.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

from offmap.lab import apt
from offmap.lab.cache import cache_folder, locked, replace_folder, scratch_folder, sha256_of
from offmap.lab.errors import LabError
from offmap.lab.installed import find_program
from offmap.lab.kernel import HostKernel, image_release
from offmap.lab.kernel_tree import damaged, used_files, write_manifest

DEFAULT_SERIES = "6.12"
RECORD = "packages.json"  # {file name: sha256} of the .deb files that the tree is unpacked from
BOOT_FILES = ("vmlinuz", "config", "System.map")
ELSEWHERE = "give --host-kernel FILE (a bzImage; --modules DIR for its modules), or --host-kernel running"


def default_spec() -> str:
    """Return the kernel to use where none is named: Debian's where apt is, else the running one."""
    return f"debian:{DEFAULT_SERIES}" if apt.have_apt() else "running"


def host_kernel(
    spec: str | None = None,
    modules: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
    downloaded: Callable[[str], None] = lambda _: None,
) -> HostKernel:
    """Find, download or build the kernel that ``spec`` names; with a warm cache this needs no network.

    Args:
        spec: ``debian:6.12`` (any series that Debian has), ``patched:7.3``, ``running``, or the path of a bzImage.
        modules: its ``lib/modules/RELEASE`` folder, for a path; looked for around it by default.
        say: takes a line for the user at each step of a build.
        downloaded: takes the release of a Debian kernel whose packages are here, but not unpacked yet, which takes
            seconds.

    Raises:
        LabError: there is no such kernel, or it could not be downloaded, built or read.
    """
    spec = spec or default_spec()
    if spec == "running":
        return _running(modules)
    if spec.startswith("patched:"):
        from offmap.lab.build import patched_kernel

        return patched_kernel(spec, say)
    if spec.startswith("debian:"):
        series = spec.removeprefix("debian:")
        if not re.fullmatch(r"\d+\.\d+", series):
            raise LabError(f"{spec} names no kernel series", "write it as debian:6.12")
        return _debian(spec, series, downloaded)
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


def _debian(spec: str, series: str, downloaded: Callable[[str], None]) -> HostKernel:
    store = cache_folder("kernels") / f"debian-{series}"
    with locked(store.with_name(f"{store.name}.lock")):
        tree = store / "tree"
        if damaged(tree):
            if not apt.have_apt():
                raise LabError(f"cannot download {spec}: this machine has no apt-get and dpkg-deb", ELSEWHERE)
            store.mkdir(exist_ok=True)
            for leftover in store.glob(".*"):  # of a run that was killed; we hold the lock
                shutil.rmtree(leftover)
            try:
                debs = _packages(series, store)
                downloaded(debs[0].name.partition("_")[0].removeprefix("linux-image-"))
                _unpack(debs, tree)
            except OSError as error:
                raise LabError(
                    f"cannot store {spec} in {store}: {error.strerror}", "check the disk and its rights"
                ) from error
        release = _release(tree)
    return HostKernel(spec, release, tree / "boot" / f"vmlinuz-{release}", tree / "lib/modules" / release)


def _packages(series: str, store: Path) -> list[Path]:
    """Return the verified .deb files of ``store``, downloading them if any is absent or not what was recorded."""
    debs = store / "packages"
    try:
        recorded = json.loads((debs / RECORD).read_text())
        if recorded and all(sha256_of(debs / name) == digest for name, digest in recorded.items()):
            return [debs / name for name in recorded]
    except (OSError, ValueError, TypeError, AttributeError):
        pass  # no record, or half of one: download again

    def fetch(view: apt.AptView) -> list[Path] | None:
        packages = apt.find_kernel(view, series)
        if not packages:
            return None
        with scratch_folder(debs) as scratch:
            digests = {apt.download(view, package, scratch).name: package.sha256 for package in packages}
            (scratch / RECORD).write_text(json.dumps(digests))
            replace_folder(scratch, debs)
        return [debs / name for name in digests]

    return apt.from_views(f"a Debian {series} kernel", series, fetch, f"check the network, or {ELSEWHERE}")


def _unpack(debs: Iterable[Path], tree: Path) -> None:
    """Unpack the image, its configuration and its modules to ``tree``, index the modules, and write the manifest."""
    with scratch_folder(tree) as scratch:
        raw, new = scratch / "raw", scratch / "new"
        for deb in debs:
            _run("dpkg-deb", "-x", str(deb), str(raw))
        (new / "lib").mkdir(parents=True)
        # Since trixie the modules are packaged below /usr/lib.
        found = next((folder for folder in (raw / "lib/modules", raw / "usr/lib/modules") if folder.is_dir()), None)
        if found is None:
            raise LabError(f"the packages in {tree.parent} hold no kernel modules", ELSEWHERE)
        found.rename(new / "lib/modules")
        release = _release(new)
        (new / "boot").mkdir()
        for name in BOOT_FILES:
            # Since 7.1 they are packaged beside the modules.
            places = (raw / "boot" / f"{name}-{release}", new / "lib/modules" / release / name)
            for place in places:
                if place.is_file():
                    place.rename(new / "boot" / f"{name}-{release}")
        image_release(new / "boot" / f"vmlinuz-{release}")
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


def _run(*argv: str) -> None:
    program = find_program(argv[0])
    if program is None:
        raise LabError(f"no {argv[0]} command", f"install {'kmod' if argv[0] == 'depmod' else 'dpkg'}")
    done = subprocess.run([program, *argv[1:]], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise LabError(f"{argv[0]} failed: {reason}", "check that the cache folder's disk is not full")
