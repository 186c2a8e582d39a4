"""The host's kernel: load modules, write its knobs, read the amounts of memory that it reports."""

import re
import subprocess
from pathlib import Path

from offmap.errors import OffmapError
from offmap.lab.installed import find_program

_MEMINFO = Path("/proc/meminfo")


def load_modules(*names: str) -> None:
    """Load modules of the running kernel. Modules that are built in count as loaded.

    Raises:
        OffmapError: a module cannot be loaded.
    """
    modprobe = find_program("modprobe")
    if modprobe is None:
        raise OffmapError("there is no modprobe", "install kmod")
    done = subprocess.run([modprobe, "-a", *names], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise OffmapError(f"this kernel has not all of {', '.join(names)}: {last.removeprefix('modprobe: ')}")


def write_knob(path: str, value: str) -> None:
    """Write to a file in /proc or /sys. Raises OffmapError: the kernel refuses the value."""
    try:
        Path(path).write_text(value)
    except OSError as error:
        raise OffmapError(f"the kernel does not take {value!r} in {path}: {error.strerror}") from None


def meminfo() -> dict[str, int]:
    """/proc/meminfo: KiB by name. A line without a unit is a count."""
    return {name: int(value) for name, value in re.findall(r"^(\S+):\s+(\d+)", _MEMINFO.read_text(), re.MULTILINE)}


def direct_map() -> dict[str, int]:
    """KiB of the direct map by page size, as /proc/meminfo names them; empty if this kernel does not tell."""
    return {name: kib for name, kib in meminfo().items() if name.startswith("DirectMap")}


def host_memory_kib() -> int:
    """The host kernel's memory in KiB (MemTotal)."""
    return meminfo().get("MemTotal", 0)
