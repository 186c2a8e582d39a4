"""Pools by the command line, where there is none."""

from pathlib import Path

import pytest

from offmap.errors import OffmapError
from offmap.kmod import pool
from offmap.memory.backend import parse_backend


def test_what_is_not_there_is_said() -> None:
    with pytest.raises(OffmapError, match=r"there is no pool at /nowhere; see offmap pool status"):
        pool.resize("/nowhere", 1 << 30)
    with pytest.raises(OffmapError, match="there is no group 'nobody knows'; write an existing name, or a number"):
        pool.create("/nowhere", 1 << 30, group="nobody knows")


def test_users_go_by_name_or_number() -> None:
    assert (pool._id("root", "user"), pool._id("root", "group"), pool._id("4711", "group")) == (0, 0, 4711)


def test_a_folder_that_is_no_pool_is_refused(tmp_path: Path) -> None:
    backend = parse_backend(f"pool,path={tmp_path}")
    with pytest.raises(OffmapError, match="cannot give hidden memory: it is in no pool of the offmap module; make"):
        backend.allocate(None, 4096)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
