"""KVM's statistics file, from bytes laid out as the kernel lays them out."""

import struct
from collections.abc import Sequence

import pytest

from offmap.kvm.stats import MappedPages, read_stats

NAME_SIZE = 48  # KVM_STATS_NAME_SIZE of include/linux/kvm_host.h


def stats_file(stats: Sequence[tuple[str, Sequence[int]]], name_size: int = NAME_SIZE, gap: int = 0) -> bytes:
    """Header, id string, descriptors and data, with `gap` bytes between the parts."""
    id_offset = 24 + gap
    desc_offset = id_offset + name_size + gap
    data_offset = desc_offset + len(stats) * (16 + name_size) + gap
    out = struct.pack("<6I", 0, name_size, len(stats), id_offset, desc_offset, data_offset) + bytes(gap)
    out += b"kvm-1234".ljust(name_size, b"\0") + bytes(gap)
    data = b""
    for name, values in stats:
        out += struct.pack("<IhHII", 0, 0, len(values), len(data), 0) + name.encode().ljust(name_size, b"\0")
        data += struct.pack(f"<{len(values)}Q", *values)
    return out + bytes(gap) + data


def parse(file: bytes) -> dict[str, tuple[int, ...]]:
    return read_stats(lambda size, offset: file[offset : offset + size])


@pytest.mark.parametrize("gap", [0, 8, 4096])
@pytest.mark.parametrize("name_size", [16, NAME_SIZE, 64])
def test_names_and_values(gap: int, name_size: int) -> None:
    stats = [("remote_tlb", [7]), ("histogram", [1, 2, (1 << 64) - 1]), ("pages_2m", [128])]
    assert parse(stats_file(stats, name_size, gap)) == {name: tuple(values) for name, values in stats}


def test_a_name_may_fill_its_place_and_there_may_be_no_statistics() -> None:
    assert parse(stats_file([("x" * 16, [1])], 16)) == {"x" * 16: (1,)}
    assert parse(stats_file([])) == {}


def test_page_sizes_are_picked_out() -> None:
    mapped = MappedPages.of({"pages_4k": (12,), "pages_2m": (128,), "pages_1g": (0,), "other": (5,)})
    assert mapped == MappedPages(12, 128, 0)
    assert mapped.by_size() == {"1G": 0, "2M": 128, "4K": 12}
    assert str(mapped) == "128 x 2M, 12 x 4K"
    assert str(MappedPages(0, 0, 0)) == "nothing mapped"


def test_page_sizes_that_are_not_told_are_not_zero() -> None:
    assert MappedPages.of({"pages_4k": (12,)}) is None
