"""Facts that each result carries: about the cell's host, its guest, and the machine under the host.

Unknown facts are left out.
"""

import os
from functools import cache

from msgspec import Struct

from offmap.audit.host import host_facts
from offmap.lab.errors import LabError
from offmap.lab.qemu import find_qemu, qemu_version


class Host(Struct, frozen=True, omit_defaults=True):
    """The host of a cell; empty if it never booted.

    Attributes:
        kernel: what ``uname -r`` says.
        cmdline: of its kernel.
        lab: whether it is a disposable host.
        name: its host name, which a published report leaves out.
    """

    kernel: str = ""
    cpu: str = ""
    microcode: str = ""
    cmdline: str = ""
    memory_bytes: int = 0
    lab: bool = False
    name: str = ""


class Guest(Struct, frozen=True, omit_defaults=True):
    """The guest that a cell is about, by its console.

    Attributes:
        kernel: what ``uname -r`` says.
        clocksource: as the guest names it.
    """

    kernel: str = ""
    clocksource: str = ""


class Machine(Struct, frozen=True, omit_defaults=True):
    """The machine under a disposable host, or the machine that is the host. It is not named.

    Attributes:
        accel: what ran the host: ``tcg``, ``kvm`` or ``native``; empty if there was no host.
        processors: how many the hosts could use.
        qemu: its version line.
        kernel: what ``uname -r`` says; left out if the host was emulated, as it does not matter then.
    """

    accel: str = ""
    cpu: str = ""
    microcode: str = ""
    processors: int = 0
    memory_bytes: int = 0
    qemu: str = ""
    kernel: str = ""


def this_host() -> Host:
    """The host that this process runs on."""
    facts = host_facts()
    return Host(facts.kernel, facts.cpu, facts.microcode, facts.cmdline, facts.memory_bytes, facts.lab, facts.name)


def this_machine(accel: str) -> Machine:
    """The machine that this process runs on. It ran the host by `accel`."""
    facts = host_facts()
    return Machine(
        accel=accel,
        cpu=facts.cpu,
        processors=len(os.sched_getaffinity(0)),
        memory_bytes=facts.memory_bytes,
        qemu="" if accel == "native" else _qemu_version(),
        kernel="" if accel == "tcg" else facts.kernel,
    )


@cache
def _qemu_version() -> str:
    """``QEMU emulator version 7.2.22 …``; empty if there is no QEMU."""
    try:
        return qemu_version(find_qemu())
    except (LabError, OSError):
        return ""
