"""Pages that a file holds and the process does not map: what cannot be asked is never taken for a hole."""

import contextlib
import ctypes
import errno
import mmap
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from offmap.audit import residency
from offmap.audit.frames import EMPTY, POPULATED, UNKNOWN, resolve
from offmap.audit.guest_ram import RamRange
from offmap.audit.pageflags import PageFlags
from offmap.audit.process import Process
from offmap.audit.residency import _data, _in_child, resident_frames
from offmap.audit.result import Source
from offmap.audit.status import status_of
from offmap.errors import Undetermined

from .shared_memory import VA, process_that_shares_memory

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


def test_a_file_that_kills_who_looks_at_it_is_an_error_and_no_end() -> None:
    fd = os.memfd_create("ram")
    try:
        os.ftruncate(fd, PAGE)
        os.pwrite(fd, b"x", 0)

        def look() -> None:
            with mmap.mmap(fd, PAGE, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ) as view:
                os.ftruncate(fd, 0)
                view[0]

        with pytest.raises(OSError, match=f"signal {int(signal.SIGBUS)}"):
            _in_child(look)
    finally:
        os.close(fd)


def test_an_error_of_the_child_is_the_callers() -> None:
    def look() -> None:
        raise OSError(errno.ESPIPE, "Illegal seek")

    with pytest.raises(OSError, match="Illegal seek") as raised:
        _in_child(look)
    assert raised.value.errno == errno.ESPIPE


def test_pages_of_a_file_are_found_by_the_child() -> None:
    fd = os.memfd_create("ram")
    try:
        os.ftruncate(fd, 8 * PAGE)
        os.pwrite(fd, b"x", 2 * PAGE)
        wanted = np.ones(8, dtype=np.bool_)
        _, resident, empty = resident_frames(fd, 0, 8, wanted, counts_holes=True)
        assert np.flatnonzero(resident).tolist() == [2]
        assert np.flatnonzero(empty).tolist() == [0, 1, 3, 4, 5, 6, 7]
    finally:
        os.close(fd)


@pytest.mark.parametrize("kind", ["[vvar]", "[heap]"])
def test_a_hole_in_a_mapping_of_the_kernels_is_no_emptiness(kind: str) -> None:
    # The frames behind [vvar] are in no pagemap (VM_PFNMAP), and untouched anonymous memory will be mapped.
    with Process(os.getpid()) as process, PageFlags("/dev/null") as flags:
        part = next(mapping for mapping in process.maps() if mapping.path == kind)
        if kind == "[heap]":
            libc = ctypes.CDLL(None)
            libc.sbrk.restype = ctypes.c_void_p
            start = -(-int(libc.sbrk(0)) // PAGE) * PAGE
            libc.sbrk(ctypes.c_long(start + 16 * PAGE - int(libc.sbrk(0))))
            ranges = [RamRange(start, 16 * PAGE, Source.REQUESTED)]
        else:
            ranges = [RamRange(part.start, part.size, Source.REQUESTED)]
        frames = resolve(process, ranges, flags)
    reasons = {frames.reasons[why] for why in frames.why[frames.state != POPULATED].tolist()}
    assert reasons == ({"in no page table of the process ([vvar])"} if kind == "[vvar]" else {"anonymous memory"})
    assert set(frames.state[frames.state != POPULATED].tolist()) == {UNKNOWN if kind == "[vvar]" else EMPTY}


def test_a_process_that_runs_another_program_is_seen_though_another_keeps_its_memory(tmp_path: Path) -> None:
    part = RamRange(VA, PAGE, Source.REQUESTED)
    with (
        process_that_shares_memory(tmp_path) as (pid, run_another),
        PageFlags("/dev/null") as flags,
        Process(pid) as process,
    ):
        assert resolve(process, [part], flags).state.tolist() == [POPULATED]
        run_another()
        process.check_alive()  # the pagemap goes on
        # What it has there now is another page, and not populated.
        assert resolve(process, [part], flags).state.tolist() == [EMPTY]


def test_a_file_that_does_not_answer_is_unknown_and_no_other_one_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tmp_path / "asked"

    def no_answer(fd: int) -> int:
        with asked.open("a") as file:  # in a child
            file.write("x")
        time.sleep(3600)
        return 0

    monkeypatch.setattr(residency, "file_system", no_answer)
    monkeypatch.setattr(residency, "_LONGEST_LOOK", 0.2)
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(Process(os.getpid()))
        flags = stack.enter_context(PageFlags("/dev/null"))
        ranges = []
        for name in ("one", "two"):
            file = stack.enter_context((tmp_path / name).open("w+b"))
            file.truncate(2 * PAGE)
            memory = stack.enter_context(mmap.mmap(file.fileno(), 2 * PAGE))
            memory[0] = 1
            held = ctypes.c_char.from_buffer(memory)
            ranges.append(RamRange(ctypes.addressof(held), 2 * PAGE, Source.REQUESTED))
            del held
        frames = resolve(process, ranges, flags)
    assert [(int(state), frames.reasons[why]) for state, why in zip(frames.state, frames.why, strict=True)] == [
        (POPULATED, ""),
        (
            UNKNOWN,
            "in no page table of the process, and its file cannot be asked ([Errno 110] a look at it took too long)",
        ),
        (POPULATED, ""),
        (UNKNOWN, "in no page table of the process, and one of its files does not answer"),
    ]
    assert asked.read_text() == "x"


def test_a_status_is_that_of_stat(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(PAGE))
    for path in (tmp_path, tmp_path / "file", Path("/dev/null"), Path("/proc/self/exe")):
        status, expected = status_of(str(path)), path.stat()
        assert status is not None
        assert all(getattr(status, name) == getattr(expected, name) for name in status._fields)
    assert status_of(str(tmp_path / "none")) is None
