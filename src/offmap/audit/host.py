"""Facts of the host that a result is stamped with."""

import os
import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

__all__ = ["HostFacts", "host_facts", "utc_now"]

_LAB_MARK = "offmap.lab"  # on the kernel command line of a disposable host


@dataclass(frozen=True)
class HostFacts:
    """Kernel release, CPU model, kernel command line, memory in bytes, whether it is a lab host, and its name."""

    kernel: str
    cpu: str
    microcode: str
    cmdline: str
    memory_bytes: int
    lab: bool
    name: str = ""

    def to_json(self) -> dict[str, str | int | bool]:
        return asdict(self)


def _field(text: str, name: str) -> str:
    """The first ``name : value`` of a /proc file; empty if there is none."""
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() == name:
            return value.strip()
    return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def host_facts() -> HostFacts:
    """Ask this host; what it does not tell stays empty."""
    cpuinfo = _read("/proc/cpuinfo")
    cmdline = _read("/proc/cmdline").strip()
    memory = _field(_read("/proc/meminfo"), "MemTotal").split()
    marked = any(word == _LAB_MARK or word.startswith(_LAB_MARK + "=") for word in cmdline.split())
    return HostFacts(
        kernel=platform.release(),
        cpu=_field(cpuinfo, "model name"),
        microcode=_field(cpuinfo, "microcode"),
        cmdline=cmdline,
        memory_bytes=int(memory[0]) * 1024 if memory and memory[0].isdigit() else 0,
        lab=marked or bool(os.environ.get("OFFMAP_LAB")),
        name=platform.node(),
    )


def utc_now() -> str:
    """The time that a result is stamped with, to the second: ``2026-11-22T22:50:26Z``."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
