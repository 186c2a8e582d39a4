"""Facts of the host that a result is stamped with."""

import os
import platform
import re
from datetime import UTC, datetime
from typing import Annotated

from msgspec import Meta

from offmap.files import text_of
from offmap.report.typed import Count, Document, Malformed

_FORMAT = "%Y-%m-%dT%H:%M:%SZ"
_LAB_MARK = "offmap.lab"  # on the kernel command line of a disposable host


Time = Annotated[str, Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
"""UTC, to the second: ``2026-11-22T22:50:26Z``."""


def parse_time(text: str) -> datetime:
    """When that was. Raises Malformed: there is no such time."""
    try:
        return datetime.strptime(text, _FORMAT).replace(tzinfo=UTC)
    except ValueError:
        raise Malformed(f"its time is {text!r:.40}") from None


class HostFacts(Document, frozen=True):
    """The host whose kernel was audited.

    Attributes:
        kernel: Kernel release, as uname -r.
        cpu: CPU model name; empty if it does not tell.
        microcode: Microcode revision; empty if it does not tell.
        cmdline: Command line of the kernel.
        memory_bytes: MemTotal of /proc/meminfo, in bytes.
        lab: Whether it is a disposable lab host.
        name: Its name, as uname -n.
    """

    kernel: str
    cpu: str
    microcode: str
    cmdline: str
    memory_bytes: Count
    lab: bool
    name: str


def _field(text: str, name: str) -> str:
    """The first ``name : value`` of a /proc file; empty if there is none."""
    found = re.search(rf"^{name}[ \t]*:(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def host_facts() -> HostFacts:
    """Ask this host; what it does not tell stays empty."""
    cpuinfo = text_of("/proc/cpuinfo")
    cmdline = text_of("/proc/cmdline").strip()
    memory = _field(text_of("/proc/meminfo"), "MemTotal").split()
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
    return datetime.now(UTC).strftime(_FORMAT)
