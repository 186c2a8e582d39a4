"""Memory that is mapped and is not System RAM, told from devices and from what is the firmware's."""

from pathlib import Path

import numpy as np
import pytest

from offmap.audit.beside_ram import BesideRam, FirmwareMap, beside_ram, firmware_map
from offmap.audit.caching import is_cached
from offmap.audit.mappings import RUN, KernelMappings
from offmap.errors import Undetermined

PAGE, MIB = 4096, 1 << 20
VMALLOC = 0xFFFF_C900_0000_0000
# A host of 64 MiB; the command line set the last 16 MiB of its RAM aside.
RAM = [(PAGE, 0x9F000), (MIB, 48 * MIB)]
FIRMWARE = FirmwareMap([(0, 0xA0000), (MIB, 64 * MIB)], [(64 * MIB, 65 * MIB)])


def mappings(*pieces: tuple[int, int, bool]) -> KernelMappings:
    """The kernel maps these: (physical address, bytes, cached)."""
    runs = np.zeros(len(pieces), dtype=RUN)
    for index, (pa, size, cached) in enumerate(pieces):
        runs[index] = (VMALLOC + index * (1 << 30), pa, size, 1, True, True, cached)
    return KernelMappings(runs, (), {}, 0)


@pytest.mark.parametrize(
    ("pa", "cached", "memory"),
    [
        (2 * MIB, True, False),  # RAM: kcore has it
        (2 * MIB, False, False),
        (50 * MIB, True, True),  # set aside, and mapped by somebody
        (50 * MIB, False, True),
        (64 * MIB, True, False),  # ACPI's tables
        (64 * MIB, False, False),
        (0xA0000, True, False),  # a graphics card's window
        (0, True, False),
        (1 << 32, True, True),  # persistent memory that was added later
        (0xFEE0_0000, False, False),  # registers
    ],
)
def test_memory_is_told_from_devices_and_firmware(pa: int, cached: bool, memory: bool) -> None:
    found = beside_ram(mappings((pa, PAGE, cached)), RAM, FIRMWARE)
    in_ram = any(start <= pa < end for start, end in RAM)
    assert found == BesideRam([(pa, pa + PAGE)] if memory else [], 0 if memory or in_ram else 1)


def test_a_page_that_is_mapped_in_two_ways_is_memory_if_either_is() -> None:
    found = beside_ram(mappings((1 << 32, 2 * PAGE, False), (1 << 32, PAGE, True)), RAM, FIRMWARE)
    assert found == BesideRam([(1 << 32, (1 << 32) + PAGE)], 1)


def test_a_run_that_begins_in_ram_is_divided() -> None:
    assert beside_ram(mappings((47 * MIB, 18 * MIB, True)), RAM, FIRMWARE) == BesideRam([(48 * MIB, 64 * MIB)], 256)
    # Without the firmware's word what is cached is memory.
    assert beside_ram(mappings((64 * MIB, PAGE, True)), RAM, FirmwareMap([], [])).memory


def test_the_firmwares_map_is_read(tmp_path: Path) -> None:
    ranges = (
        ("0x0", "0x9fbff", "System RAM"),
        ("0x9fc00", "0x9ffff", "Reserved"),
        ("0x100000", "0x1fffff", "Soft Reserved"),
    )
    for number, (start, end, sort) in enumerate(ranges):
        (tmp_path / str(number)).mkdir()
        for name, text in (("start", start), ("end", end), ("type", sort)):
            (tmp_path / str(number) / name).write_text(text + "\n")
    assert firmware_map(tmp_path) == FirmwareMap([(0, 0xA0000), (MIB, 2 * MIB)], [(0x9F000, 0xA0000)])
    assert firmware_map(tmp_path / "none") == FirmwareMap([], [])
    (tmp_path / "0" / "end").write_text("?")
    with pytest.raises(Undetermined, match="cannot read"):
        firmware_map(tmp_path)


def test_how_a_leaf_is_cached_is_by_its_entry_of_the_pat() -> None:
    def cached(pwt: int, pcd: int, pat: int, depth: int) -> bool:
        entry = 1 | pwt << 3 | pcd << 4 | pat << (7 if depth == 1 else 12) | (1 << 7 if depth > 1 else 0)
        return bool(is_cached(np.array([entry], dtype=np.uint64), depth)[0])

    for depth in (1, 2, 3):
        found = [cached(index & 1, index >> 1 & 1, index >> 2, depth) for index in range(8)]
        assert found == [True, False, False, False, True, True, False, True]  # WB WC UC- UC WB WP UC- WT
