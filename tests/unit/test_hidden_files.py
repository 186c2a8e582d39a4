"""Open files of hidden memory: what the module says of its pools, and refusals."""

import errno
import os
from pathlib import Path

import pytest

from offmap import hidden_files
from offmap.errors import BackendRefused
from offmap.uapi import offmap_module as uapi

MIB = 1 << 20


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a file for what the module says."""
    monkeypatch.setattr(uapi, "POOLS", str(tmp_path / "pools"))
    return tmp_path / "pools"


def test_without_the_module_no_device_is_a_pools(said: Path) -> None:
    assert not hidden_files.is_of_a_pool(52)


def test_a_device_is_a_pools_if_the_module_says_so(said: Path) -> None:
    said.write_text(f"0:52 {256 * MIB} {64 * MIB} 4096 0 0 3 -1\n0:53 1 1 0 0 0 0 0\n")
    assert hidden_files.is_of_a_pool(os.makedev(0, 52))
    assert not hidden_files.is_of_a_pool(os.makedev(0, 54))


def test_a_folder_of_a_disk_is_refused_before_a_file_is_made_there(said: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendRefused, match="it is in no pool of the offmap module; make a pool"):
        hidden_files.pool_file(str(tmp_path), 4096)
    with pytest.raises(BackendRefused, match="No such file or directory; make a pool"):
        hidden_files.pool_file(str(tmp_path / "none"), 4096)


def test_a_quota_is_told_from_a_pool_that_is_full() -> None:
    refusal = hidden_files._pool_refusal(OSError(errno.EDQUOT, ""), "/run/hidden", -1, 1 << 30)
    assert str(refusal) == (
        "/run/hidden cannot give 1 GiB: a user may not have so much of it; ask for less, or end another guest of yours"
    )
