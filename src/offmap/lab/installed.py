"""What this machine and this installation of offmap have: shipped files, the system's programs, the boot's id."""

import os
import shutil
from pathlib import Path

import offmap
from offmap.lab.errors import LabError

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def shipped(folder: str, packaged: str, file: str) -> Path:
    """A folder that is shipped beside the package, and holds `file`.

    Args:
        folder: its place in a checkout.
        packaged: its name in a wheel, where pyproject.toml puts it into the package.

    Raises:
        LabError: this installation has none.
    """
    package = Path(offmap.__file__).parent
    for place in (package / packaged, package.parents[1] / folder):
        if (place / file).is_file():
            return place
    raise LabError(f"this installation of offmap has no {folder}/{file}", "install offmap again")


def search_path() -> str:
    """PATH with the folders of system programs (depmod, chroot, mke2fs), which users do not have in theirs."""
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def find_program(name: str) -> str | None:
    """The path of a program, a system program too; None if it is not installed."""
    return shutil.which(name, path=search_path())


def boot_id() -> str:
    """The id of this machine's boot: another one after each start."""
    return _BOOT_ID.read_text().strip()
