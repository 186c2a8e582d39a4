"""What a sweep searched, by kind."""

from pathlib import Path

import pytest

from offmap.attack import sweep_parts
from offmap.attack.sweep_parts import parts_of
from offmap.audit.kinds import parse_vmallocinfo
from offmap.audit.pageflags import KPF_ANON, KPF_BUDDY, KPF_LRU, KPF_SLAB, PageFlags
from offmap.audit.readable import Piece
from offmap.audit.regions import DIRECT_MAP, VMALLOC, Layout

PAGE = 4096
BASE, AREA = 0xFFFF_8880_0000_0000, 0xFFFF_C900_0000_0000
STACK = "0xffffc90000000000-0xffffc90000005000   20480 dup_task_struct+0x54/0x1b0 pages=4 vmalloc N0=4\n"


def test_each_page_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [1 << KPF_BUDDY, 1 << KPF_SLAB, 1 << KPF_ANON | 1 << KPF_LRU, 1 << KPF_LRU, 0]
    path = tmp_path / "kpageflags"
    path.write_bytes(b"".join(each.to_bytes(8, "little") for each in flags))
    monkeypatch.setattr(sweep_parts, "read_vmallocinfo", lambda: parse_vmallocinfo(STACK))
    layout = Layout([(BASE, BASE + (1 << 40), DIRECT_MAP), (AREA, AREA + (1 << 40), VMALLOC)])
    pieces = [Piece(BASE, 0, 5 * PAGE), Piece(AREA, 0, 4 * PAGE), Piece(AREA + 8 * PAGE, 0, 3 * PAGE)]
    with PageFlags(str(path)) as kpageflags:
        found = {part.name: part.bytes // PAGE for part in parts_of(pieces, kpageflags, layout)}
    assert found == {
        "kernel stacks": 4,
        VMALLOC: 3,
        "free pages": 1,
        "slab": 1,
        "memory of processes, plain guests' RAM among it": 1,
        "page cache, memory files among it": 1,
        "other memory of the kernel's own": 1,
    }
