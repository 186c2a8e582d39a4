"""Pools by the command line, where there is none."""

import mmap
import os
from pathlib import Path

import pytest

from offmap.cli.pool import _line
from offmap.errors import OffmapError
from offmap.kmod import pool
from offmap.kmod.pool_processes import PoolProcess, kvm_pages, pool_processes
from offmap.kvm.stats import MappedPages
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


def test_the_pages_by_which_kvm_maps_the_guests_of_a_process(tmp_path: Path) -> None:
    for vm, counts in (("12-9", (3, 128, 0)), ("12-11", (1, 0, 1)), ("112-9", (7, 7, 7)), ("12-13", ())):
        (tmp_path / vm).mkdir()
        for size, count in zip(("4k", "2m", "1g"), counts, strict=False):
            (tmp_path / vm / f"pages_{size}").write_text(f"{count}\n")
    assert kvm_pages(12, tmp_path) == MappedPages(4, 128, 1)
    assert kvm_pages(2, tmp_path) is None


def test_who_maps_files_of_a_file_system() -> None:
    fd = os.memfd_create("file")
    os.truncate(fd, 8192)
    status = os.fstat(fd)
    device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    with mmap.mmap(fd, 8192):
        found = pool_processes({device})
    os.close(fd)
    assert found.keys() == {device}
    users = found[device]
    assert any(user.pid == os.getpid() and user.mapped >= 8192 for user in users)


def test_the_name_of_a_process_does_nothing_to_a_terminal() -> None:
    assert _line(PoolProcess(7, "\r\x1b[Ka\n", 4096, None)) == "process 7 (??[Ka?): 4 KiB"
