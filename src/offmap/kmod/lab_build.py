"""The module for a disposable host, and the folder in which it is built for a Debian kernel.

Any machine that has apt and dpkg-deb can do it. A module must be built by the compiler that built the kernel, and its
headers come with tools (objtool, modpost) that need the C library of their own Debian release: on another release,
neither is there. So the packages that the headers depend on are downloaded, unpacked next to each other, and make runs
with that folder as its root. Nothing is installed, and no package's script is run.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from offmap.kmod.build import build, built_module, why_make_failed
from offmap.kmod.modinfo import release_of
from offmap.kmod.source import copy_sources, source_folder
from offmap.lab import apt
from offmap.lab.cache import cache_folder, locked
from offmap.lab.errors import LabError
from offmap.lab.host import LabHost
from offmap.lab.installed import search_path
from offmap.lab.kernel import HostKernel
from offmap.lab.packages import COMPLETE, provide

# Packages of tools that the kernel's makefiles run. The headers' packages do not depend on them.
TOOLS = ("make", "binutils", "dash", "bash", "coreutils", "sed", "grep", "mawk", "findutils", "diffutils", "perl-base")
# Large, and of no use to a kernel module.
UNUSED = ("./usr/share/doc*", "./usr/share/man*", "./usr/share/locale*", "*/lib?san.*", "*/libhwasan.*", "*/lto1")

_SCRIPT = """
mount --rbind /proc "$1/proc" && mount --rbind /dev "$1/dev" || exit 90
exec chroot "$1" /usr/bin/env -i PATH=/usr/bin:/usr/sbin LC_ALL=C sh -c '
    make -C "/lib/modules/$1/build" "M=$2" modules && strip --strip-debug "$2"/*.ko' sh "$2" "$3"
"""


def lab_module(kernel: HostKernel) -> Path:
    """Build offmap.ko for the kernel of a lab host, unless that has been done. Return its path.

    For a Debian kernel the headers are downloaded, with the compiler that they need; for any other, they must be here:
    what ``build`` in its modules' folder leads to (``make modules_install`` puts it there).

    Raises:
        LabError: there is no way to the headers of this kernel.
        OffmapError: it does not build.
    """
    module = built_module(kernel.release)
    if not kernel.name.startswith("debian:"):
        return _of_ones_own(kernel, module)
    if module.is_file() and release_of(module) == kernel.release:
        return module
    module.parent.mkdir(exist_ok=True)
    with locked(module.parent.with_name(f"{module.parent.name}.lock")):
        if not module.is_file():
            build_in_root(kernel, module)
    if release_of(module) != kernel.release:
        raise LabError(f"{module} was built for another kernel than {kernel.release}", f"remove {module.parent}")
    return module


def load(host: LabHost, module: Path, timeout: float | None = None) -> str:
    """Load a module in a lab host. Return why its kernel refuses it, in one line; empty if it is loaded.

    Args:
        timeout: seconds that this may take.

    Raises:
        LabError: the host ended, or the time was up.
    """
    done = host.output(["insmod", str(module)], timeout=timeout)
    if done.status == 0:
        return ""
    lines = (done.stdout + done.stderr).decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else f"insmod ended with status {done.status}"


def _of_ones_own(kernel: HostKernel, module: Path) -> Path:
    has_headers = (kernel.modules / "build/Makefile").is_file()
    if not has_headers and module.is_file() and release_of(module) == kernel.release:
        return module  # it is a Debian kernel that was given as a file
    return build(kernel.release, modules=kernel.modules if has_headers else None)


def get_headers(release: str) -> None:
    """Get what modules for a Debian kernel are built with, unless that has been done. It does not need the kernel.

    Raises:
        LabError: the headers of exactly this kernel cannot be had.
    """
    store = cache_folder("build-roots") / release
    with locked(store.with_name(f"{store.name}.lock")):
        if not (store / COMPLETE).is_file():
            _provide(release, store)


def build_in_root(kernel: HostKernel, module: Path, sources: Path | None = None) -> None:
    """Build a module for a Debian kernel and store it as `module`, whose name is the one that its Kbuild gives it.

    Args:
        sources: the folder that holds them; offmap.ko's by default.

    Raises:
        LabError: the headers of exactly this kernel cannot be had, or nothing can be built here.
        OffmapError: it does not build.
    """
    store = cache_folder("build-roots") / kernel.release
    with locked(store.with_name(f"{store.name}.lock")):
        if not (store / COMPLETE).is_file():
            _provide(kernel.release, store)
        work = store / f"{module.stem}-module"
        shutil.rmtree(work, ignore_errors=True)
        copy_sources(sources or source_folder(), work)
        done = _run_in(store, kernel.release, f"/{work.name}")
        if done.returncode != 0:
            if done.returncode == 90 or "unshare" in done.stderr:
                reason = (done.stderr.strip().splitlines() or ["no mount namespace"])[0]
                raise LabError(f"cannot make a root folder to build in: {reason}", "run as root")
            raise why_make_failed(kernel.release, done.stdout + done.stderr)
        module.parent.mkdir(parents=True, exist_ok=True)
        (work / module.name).replace(module)


def _run_in(root: Path, release: str, work: str) -> "subprocess.CompletedProcess[str]":
    unshare = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    return subprocess.run(
        [*unshare, "sh", "-c", _SCRIPT, "sh", str(root), release, work],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PATH": search_path()},
    )


def _provide(release: str, store: Path) -> None:
    if not apt.have_apt():
        raise LabError(
            f"cannot get the headers of kernel {release}: this machine has no apt-get and dpkg-deb",
            f"install them, so that /lib/modules/{release}/build is there",
        )
    headers = f"linux-headers-{release}"
    series = ".".join(release.split(".")[:2])

    remedy = f"check the network; if Debian has a newer kernel by now, remove {cache_folder('kernels')} and try again"
    provide(store, (headers, *TOOLS), series, _unpack, remedy)


def _unpack(debs: Sequence[Path], root: Path) -> None:
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    for name in ("proc", "dev", "tmp"):
        (root / name).mkdir()
    excluded = [f"--exclude={pattern}" for pattern in UNUSED]
    for deb in debs:
        # Not dpkg-deb -x: packages of before the merge would replace the links above by folders.
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as source:
            tar = ["tar", "-C", str(root), "-x", "--keep-directory-symlink", "--no-same-owner", *excluded]
            done = subprocess.run(tar, stdin=source.stdout, capture_output=True, text=True, check=False)
        if done.returncode != 0 or source.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["dpkg-deb failed"])[-1]
            raise LabError(f"cannot unpack {deb.name}: {reason}", "check that the cache folder's disk is not full")
    # These files are otherwise made by the packages' scripts.
    for link, target in (("awk", "mawk"), ("sh", "dash")):
        if not (root / "usr/bin" / link).exists():
            (root / "usr/bin" / link).symlink_to(target)
