"""Memory that the kernel maps and does not call System RAM: /proc/kcore does not show it, so a scan cannot read it.

It is persistent memory, what the command line set aside (``memmap=``), or memory that was taken from the kernel and
mapped again (``memremap``). Beside it the kernel of any host maps the registers of devices and the tables of its
firmware. These must not be read, and hold nobody's data. The two are told apart by these rules, in order:

1. The first MiB holds firmware's data and a graphics card's window; the kernel keeps all of it from its allocators
   (``reserve_real_mode``, since 5.13).
2. What the firmware called RAM or persistent memory is memory, whatever the kernel made of it since.
3. What the firmware called reserved, or its own tables, is the firmware's.
4. Of the rest, what is cached is memory that was added later. What is not cached is a device's.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from offmap.audit.intervals import Intervals
from offmap.audit.mappings import KernelMappings
from offmap.audit.readable import Piece, clip, frames_of, union
from offmap.errors import Undetermined
from offmap.uapi.page import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE

_MEMMAP = Path("/sys/firmware/memmap")  # Documentation/ABI/testing/sysfs-firmware-memmap
_LOW = (0, 1 << 20)
# arch/x86/kernel/e820.c, e820_type_to_string
_MEMORY = {"System RAM", "Persistent Memory", "Persistent Memory (legacy)", "Soft Reserved"}
_FIRMWARE = {"Reserved", "ACPI Tables", "ACPI Non-volatile Storage"}


class FirmwareMap(NamedTuple):
    """Physical ranges [start, end) as the firmware described them: sorted, disjoint, and of whole pages.

    A page that is of both counts as ``memory``.
    """

    memory: Sequence[tuple[int, int]]
    firmware: Sequence[tuple[int, int]]


class BesideRam(NamedTuple):
    """What is mapped and is not RAM: physical ranges [start, end) of memory, and pages of devices and firmware."""

    memory: list[tuple[int, int]]
    device_pages: int


def firmware_map(folder: Path = _MEMMAP) -> FirmwareMap:
    """What the firmware told this kernel at its boot; empty in a kernel without CONFIG_FIRMWARE_MEMMAP.

    Raises:
        Undetermined: it is there and cannot be read.
    """
    memory, firmware = [], []
    with suppress(FileNotFoundError):
        for entry in folder.iterdir():
            try:
                start, last = (int((entry / name).read_text(encoding="ascii"), 16) for name in ("start", "end"))
                sort = (entry / "type").read_text(encoding="ascii").strip()
            except FileNotFoundError:
                continue  # it was unplugged
            except (OSError, ValueError) as error:
                raise Undetermined(f"cannot read {entry}: {error}", "run the audit as root") from None
            pages = start & PAGE_MASK, last + PAGE_SIZE & PAGE_MASK
            if sort in _MEMORY:
                memory.append(pages)
            elif sort in _FIRMWARE:
                firmware.append(pages)
    return FirmwareMap(union(memory), union(firmware))


def beside_ram(mappings: KernelMappings, ram: Sequence[tuple[int, int]], firmware: FirmwareMap) -> BesideRam:
    """Sort what is mapped and is not in ``ram`` (sorted, disjoint)."""
    memory: list[Piece] = []
    devices: list[Piece] = []
    runs = mappings.runs
    for cached in (True, False):
        here = runs[runs["cached"] == cached]
        start, end = (at.astype("int64") for at in (here["pa"] >> PAGE_SHIFT, here["pa"] + here["bytes"] >> PAGE_SHIFT))
        mapped = Intervals.union(start, end)
        spans = zip(mapped.start.tolist(), mapped.end.tolist(), strict=True)
        _, left = clip([Piece(0, first * PAGE_SIZE, (last - first) * PAGE_SIZE) for first, last in spans], ram)
        low, left = clip(left, [_LOW])
        known, left = clip(left, firmware.memory)
        of_firmware, left = clip(left, firmware.firmware)
        memory += known + (left if cached else [])
        devices += low + of_firmware + ([] if cached else left)
    found = frames_of(memory)
    _, only_devices = clip([Piece(0, start, end - start) for start, end in frames_of(devices)], found)
    return BesideRam(found, sum(piece.bytes for piece in only_devices) // PAGE_SIZE)
