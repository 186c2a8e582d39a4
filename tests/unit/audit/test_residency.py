"""Pages that a file holds and the process does not map: what cannot be asked is never taken for a hole."""

import errno
import os

import numpy as np
import pytest

from offmap.audit.frames import resolve
from offmap.audit.guest_ram import RamRange
from offmap.audit.pageflags import PageFlags
from offmap.audit.process import Process
from offmap.audit.residency import _data
from offmap.audit.result import Source
from offmap.errors import Undetermined

PAGE = 4096


def test_holes_and_data_of_a_file() -> None:
    fd = os.memfd_create("ram")
    try:
        os.ftruncate(fd, 8 * PAGE)
        os.pwrite(fd, b"x", 2 * PAGE)
        os.pwrite(fd, b"x", 5 * PAGE)
        assert np.flatnonzero(_data(fd, 0, 8)).tolist() == [2, 5]
        assert np.flatnonzero(_data(fd, 5 * PAGE, 3)).tolist() == [0]
        assert not _data(fd, 6 * PAGE, 2).any()
    finally:
        os.close(fd)


def test_a_file_that_knows_no_holes_is_not_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def seek(_fd: int, _offset: int, _whence: int) -> int:
        raise OSError(errno.ESPIPE, "Illegal seek")  # an anonymous inode without llseek: guest_memfd in 6.18

    monkeypatch.setattr(os, "lseek", seek)
    with pytest.raises(OSError, match="Illegal seek"):
        _data(0, 0, 8)


@pytest.mark.parametrize("size", [1 << 60, (1 << 63) + (1 << 62)])
def test_ranges_that_no_guest_can_be_are_refused_at_once(size: int) -> None:
    flags = PageFlags("/dev/null")
    with Process(os.getpid()) as process, flags, pytest.raises(Undetermined, match="this host has"):
        resolve(process, [RamRange(0x10000, size, Source.MEMSLOT)], flags)
