"""What the host's kernel is made to do for a probe: modules, its knobs, the amounts of memory that it tells."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from offmap.errors import OffmapError

_MEMINFO = Path("/proc/meminfo")


def load_modules(*names: str) -> None:
    """Load modules of the running kernel; one that is built in is there already.

    Raises:
        OffmapError: it has none of that name.
    """
    modprobe = shutil.which("modprobe", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if modprobe is None:
        raise OffmapError("there is no modprobe", "install kmod")
    done = subprocess.run([modprobe, "-a", *names], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise OffmapError(f"this kernel has not all of {', '.join(names)}: {last.removeprefix('modprobe: ')}")


def write_knob(path: str, value: str) -> None:
    """Write to a file of the kernel's.

    Raises:
        OffmapError: it does not take that.
    """
    try:
        Path(path).write_text(value)
    except OSError as error:
        raise OffmapError(f"the kernel does not take {value!r} in {path}: {error.strerror}") from None


def meminfo() -> dict[str, int]:
    """/proc/meminfo, in KiB (and counts, where a line has no unit)."""
    return {name: int(value) for name, value in re.findall(r"^(\S+):\s+(\d+)", _MEMINFO.read_text(), re.MULTILINE)}


def direct_map() -> dict[str, int]:
    """KiB of the direct map by page size, as /proc/meminfo names them; empty where this kernel does not tell."""
    return {name: kib for name, kib in meminfo().items() if name.startswith("DirectMap")}


def host_memory_kib() -> int:
    """All memory that the host kernel has."""
    return meminfo().get("MemTotal", 0)
