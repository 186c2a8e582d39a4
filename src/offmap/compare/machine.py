"""Facts of the machine that disposable hosts run on, as far as results depend on them; nothing that names it."""

import os
import subprocess
from functools import cache
from typing import Any

from offmap.audit.host import host_facts
from offmap.lab.errors import LabError
from offmap.lab.qemu import find_qemu

__all__ = ["machine_facts"]


def machine_facts(accel: str) -> dict[str, Any]:
    """What CellResult.machine holds.

    Args:
        accel: what ran the host: ``tcg``, ``kvm``, ``native``, or nothing if there was none.

    Returns:
        ``accel``, ``cpu``, ``processors`` (that we may use), ``memory_bytes``; ``qemu`` but for native; ``kernel``
        where it ran the guests or their host, which it does not under emulation.
    """
    facts = host_facts()
    found: dict[str, Any] = {
        "accel": accel,
        "cpu": facts.cpu,
        "processors": len(os.sched_getaffinity(0)),
        "memory_bytes": facts.memory_bytes,
    }
    if accel != "native":
        found["qemu"] = _qemu_version()
    if accel != "tcg":
        found["kernel"] = facts.kernel
    return found


@cache
def _qemu_version() -> str:
    """``QEMU emulator version 7.2.22 …``; empty if there is none."""
    try:
        done = subprocess.run([find_qemu(), "--version"], capture_output=True, text=True, check=False)
    except (LabError, OSError):
        return ""
    return next(iter(done.stdout.splitlines()), "")
