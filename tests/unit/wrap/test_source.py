"""What can be placed under a VMM, and what is refused before the VMM is started."""

import os
from pathlib import Path

import pytest

from offmap.errors import BackendRefused, OffmapError
from offmap.uapi import offmap_module as uapi
from offmap.wrap import source
from offmap.wrap.source import PoolFiles, source_for

MIB, GIB = 1 << 20, 1 << 30


def test_a_host_without_the_module_is_told_before_the_vmm_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uapi, "DEVICE", str(tmp_path / "offmap"))
    with pytest.raises(OffmapError, match="offmap module load"):
        source_for("unplugged").check()


@pytest.mark.parametrize("memory", ["anon", "reserved", "secretmem"])
def test_what_is_no_file_cannot_be_placed(memory: str) -> None:
    with pytest.raises(OffmapError, match="cannot be placed under a VMM"):
        source_for(memory)


@pytest.mark.parametrize(
    ("room", "offset"),
    [(3 * GIB, 768 * MIB + 4096), (GIB + 2 * MIB, 4096), (GIB + MIB // 2, 4096), (GIB, 0)],
    ids=["1G pages", "2M pages", "2M pages, just so", "small pages"],
)
def test_a_pool_with_room_for_a_guest_takes_it(room: int, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the largest pages for which there is room, as what is in front of the guest's memory takes some too."""

    def pool_file(_path: str, size: int) -> int:
        if size > room:
            raise BackendRefused("the pool cannot give so much", "it is small", "ask for less")
        fd = os.memfd_create("pool")
        os.truncate(fd, size)
        return fd

    monkeypatch.setattr(source, "pool_file", pool_file)
    monkeypatch.setattr(source, "_guard", lambda _fd: None)
    pool = PoolFiles("/run/hidden")
    with pool.take(GIB, 5 * GIB + 768 * MIB + 4096) as piece:
        assert (piece.size, piece.offset) == (GIB, offset)
    with pytest.raises(BackendRefused):
        pool.take(room + 4096, 0)
