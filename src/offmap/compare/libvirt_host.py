"""libvirt in the root of a disposable host, with a pool for its guests. This machine gets nothing but a cache folder.

libvirt runs QEMU as an ordinary user without any right, with the seccomp sandbox on (docs/libvirt.md).
"""

import shutil
import subprocess
from importlib.resources import as_file, files
from pathlib import Path

import msgspec

from offmap.compare.job import Job
from offmap.compare.vmm_command import MEMORY_SIZE
from offmap.errors import OffmapError
from offmap.hidden_files import DEFAULT_POOL
from offmap.kmod.pool import create
from offmap.lab.packages import unpacked
from offmap.pools import pools

GROUP = "libvirt-qemu"
"""Of QEMU's user, which must be able to make files in the pool."""

_SPARE = 128 << 20  # bytes of a pool beside a guest: a new guest need not wait until the last one's pages are zeroed


def libvirt_packages() -> Path:
    """Fetch Debian's libvirt, unless that has been done; returns the folder of the unpacked packages.

    Raises:
        LabError: it cannot be had.
    """
    return unpacked("libvirt", ("libvirt-daemon", "libvirt-clients"))


def install(packages: Path) -> None:
    """Install libvirt into the root of this disposable host, as its packages would; nothing is started.

    Raises:
        OffmapError: it failed.
    """
    with as_file(files("offmap.compare").joinpath("libvirt_host.sh")) as script:
        _run("sh", str(script), str(packages))


def set_up(job: Job, folder: Path) -> Job:
    """Install libvirt, make a pool, and start libvirtd, unless that has been done.

    Args:
        folder: where QEMU's user is to find what its guest boots.

    Returns:
        The job, with files that this user can read.

    Raises:
        OffmapError: it failed.
    """
    if not any(DEFAULT_POOL in pool.paths for pool in pools()):
        install(Path(job.libvirt))
        create(DEFAULT_POOL, MEMORY_SIZE + _SPARE, group=GROUP, allow_nested=True)
        _run("libvirtd", "--daemon")  # with the pool there: it makes a folder for its guests in it
    folder.chmod(0o711)
    kernel, initrd = folder / "libvirt-kernel", folder / "libvirt-initrd"
    shutil.copyfile(job.guest_vmlinuz, kernel)
    shutil.copyfile(job.initrd, initrd)
    return msgspec.structs.replace(job, guest_vmlinuz=str(kernel), initrd=str(initrd))


def _run(*argv: str) -> None:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise OffmapError(f"cannot start {argv[0]}: {error.strerror}") from None
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise OffmapError(f"{argv[0]} ended with status {done.returncode}: {why}")
