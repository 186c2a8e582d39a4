"""The small guest that offmap boots to prove a point: busybox in an initramfs that can plant canaries."""

from collections.abc import Sequence
from importlib.resources import files

from offmap.audit.canary import CanaryKey
from offmap.lab.cpio import Entry, char_device, directory, newc, regular
from offmap.lab.initramfs import busybox

READY = "offmap-guest: ready"
"""What its console says once init has done all it was asked to."""

PLANTED = "offmap-guest: {} canaries planted"

PLANT_SECRET = "OFFMAP_SECRET=1"
"""A word for its kernel's command line: keep a secret in the memory of a shell (offmap.attack.target.PlantedSecret)."""

SECRET = "offmap-guest: secret"
"""Followed by that secret's SHA-256."""

SECRET_PROCESS = "sh"
"""The name of the process that has it."""

CLOCKSOURCE = "offmap-guest: clocksource"
"""Followed by what it keeps time by."""

KVM_CLOCK = "kvm-clock"
"""The guest kernel's own name of that clocksource (arch/x86/kernel/kvmclock.c)."""


def guest_initramfs(extra: Sequence[Entry] = ()) -> bytes:
    """An uncompressed cpio archive of busybox, its init, and `extra`.

    Raises:
        OffmapError: no static busybox is installed.
    """
    init = files("offmap.compare").joinpath("guest_init.sh").read_bytes()
    return newc(
        [
            directory("bin"),
            directory("dev"),
            char_device("dev/console", 5, 1),
            regular("bin/busybox", busybox(), 0o755),
            regular("init", init, 0o755),
            *extra,
        ]
    )


def canary_parameters(key: CanaryKey, count: int, first: int = 0) -> str:
    """What makes it plant `count` canaries, numbered from `first`, for its kernel's command line."""
    numbers = f"OFFMAP_CANARY_FIRST={first} " if first else ""
    return f"{numbers}OFFMAP_CANARIES={count} OFFMAP_CANARY_KEY={key}"
