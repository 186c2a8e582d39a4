"""Pools: what the module's file and the list of mounts say of them."""

from pathlib import Path

import pytest

from offmap import pools
from offmap.pools import Pool

MIB = 1 << 20
MOUNTINFO = r"""36 35 98:0 / / rw,noatime - ext4 /dev/root rw
40 36 0:52 / /run/hidden rw,nosuid,nodev - offmapfs offmap rw,size=262144k
41 36 0:53 / /run/two\040words rw,nosuid shared:1 - offmapfs offmap rw
42 36 0:54 / /run/user rw - tmpfs tmpfs rw
"""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a file for what the module says."""
    (tmp_path / "mountinfo").write_text(MOUNTINFO)
    monkeypatch.setattr(pools, "MOUNTINFO", tmp_path / "mountinfo")
    monkeypatch.setattr(pools, "POOLS", tmp_path / "pools")
    return tmp_path / "pools"


def test_without_the_module_there_is_none(host: Path) -> None:
    assert pools.pools() == []


def test_each_pool_with_where_it_is_mounted(host: Path) -> None:
    lines = (f"0:52 {256 * MIB} {64 * MIB} 4096 0 0 3 -1", f"0:53 {128 * MIB} 0 0 8192 4096 1 1", "0:99 1 1 0 0 0 0 0")
    host.write_text("\n".join(lines))
    first, second, third = pools.pools()
    assert first == Pool("0:52", 256 * MIB, 64 * MIB, 4096, 0, 0, 3, None, ("/run/hidden",))
    assert (second.held, second.failed, second.node, second.paths) == (8192, 4096, 1, ("/run/two words",))
    assert third.paths == ()  # in another mount namespace
