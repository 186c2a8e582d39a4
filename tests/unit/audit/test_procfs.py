"""Files of /proc: only the kernel's own are taken."""

import errno
import os
from pathlib import Path

import pytest

from offmap.audit.procfs import PROC_SUPER_MAGIC, file_system, open_path, open_proc, read_path


def test_a_file_of_proc_is_opened() -> None:
    fd = open_proc("version")
    try:
        assert file_system(fd) == PROC_SUPER_MAGIC
    finally:
        os.close(fd)
    assert read_path("/proc/version") == Path("/proc/version").read_bytes()


def test_a_folder_that_is_no_procfs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kcore").write_bytes(b"forged")
    with pytest.raises(OSError, match="not the root of a procfs") as raised:
        open_proc("kcore", root=str(tmp_path))
    assert raised.value.errno == errno.EXDEV


def test_a_part_of_a_procfs_is_not_its_root() -> None:
    with pytest.raises(OSError, match="not the root of a procfs"):
        open_proc("version", root="/proc/sys")


def test_what_is_not_there_or_leads_out_is_an_error() -> None:
    with pytest.raises(FileNotFoundError):
        open_proc("no such file")
    with pytest.raises(OSError, match=r"."):
        open_proc(f"{os.getpid()}/cwd")  # a magic link
    with pytest.raises(OSError, match=r"."):
        open_proc("../etc/passwd")


def test_a_file_elsewhere_is_opened_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"image")
    assert read_path(str(tmp_path / "image")) == b"image"
    with pytest.raises(FileNotFoundError):
        open_path(str(tmp_path / "none"))
