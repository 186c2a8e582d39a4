"""The mappings and bytes of a process: this one."""

import ctypes
import mmap
import os
import signal

import pytest

from offmap.errors import KernelError
from offmap.uapi.page import PAGE_SIZE
from offmap.wrap.address_space import OWN, SHARED, areas, has_data, populated, read_into, write_from, zero

PID = os.getpid()
libc = ctypes.CDLL(None)


@pytest.fixture
def at() -> int:
    """Give four pages, of which the second and third are there, and the third cannot be written to."""
    memory = mmap.mmap(-1, 4 * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    kept.append(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(len(memory)), mmap.MADV_NOHUGEPAGE)
    memory[PAGE_SIZE : 3 * PAGE_SIZE] = bytes(range(256)) * (2 * PAGE_SIZE // 256)
    libc.mprotect(ctypes.c_void_p(address + 2 * PAGE_SIZE), ctypes.c_size_t(PAGE_SIZE), mmap.PROT_READ)
    return address


kept: list[mmap.mmap] = []


def test_areas(at: int) -> None:
    first, second, third = areas(PID, at + PAGE_SIZE, at + 4 * PAGE_SIZE)
    assert (first.end, second.start, second.end, third.start) == (
        *(at + 2 * PAGE_SIZE, at + 2 * PAGE_SIZE),
        *(at + 3 * PAGE_SIZE, at + 3 * PAGE_SIZE),
    )
    assert (first.perms, second.perms, third.perms) == ("rw-p", "r--p", "rw-p")
    assert (first.inode, first.path, first.shared) == (0, "", False)
    assert {"rd", "wr"} <= first.flags


def test_only_what_is_there_is_populated(at: int) -> None:
    there = [(at + PAGE_SIZE, at + 3 * PAGE_SIZE)]
    assert populated(PID, at, at + 4 * PAGE_SIZE) == populated(PID, at, at + 4 * PAGE_SIZE, OWN) == there
    assert not populated(PID, at, at + 4 * PAGE_SIZE, SHARED)


def test_a_child_shares_what_nobody_has_written_to_since(at: int) -> None:
    ends = os.pipe()
    if not (child := os.fork()):
        os.close(ends[1])
        os.read(ends[0], 1)
        os._exit(0)
    try:
        assert populated(PID, at, at + 4 * PAGE_SIZE, SHARED) == [(at + PAGE_SIZE, at + 3 * PAGE_SIZE)]
        assert has_data(PID, at + PAGE_SIZE, at + 3 * PAGE_SIZE)
        kept[-1][PAGE_SIZE] = 1
        assert populated(PID, at, at + 4 * PAGE_SIZE, SHARED) == [(at + 2 * PAGE_SIZE, at + 3 * PAGE_SIZE)]
    finally:
        for end in ends:
            os.close(end)
        os.waitpid(child, 0)


def test_the_page_of_zeroes_has_no_data(at: int) -> None:
    assert not kept[-1][0]
    assert not has_data(PID, at, at + PAGE_SIZE)


def test_a_files_pages_are_not_its_own() -> None:
    with open(__file__, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as code:  # noqa: PTH123
        assert code[0]
        (start,) = (part.start for part in areas(PID, 0, 1 << 47) if part.path == __file__)
        assert populated(PID, start, start + PAGE_SIZE)
        assert not populated(PID, start, start + PAGE_SIZE, OWN)


def test_bytes_are_copied_and_zeroed_where_the_process_may_only_read(at: int) -> None:
    copy = ctypes.create_string_buffer(PAGE_SIZE)
    read_into(PID, at + 2 * PAGE_SIZE, ctypes.addressof(copy), PAGE_SIZE)
    assert copy.raw == bytes(range(256)) * (PAGE_SIZE // 256)
    zero(PID, at + PAGE_SIZE, at + 3 * PAGE_SIZE)
    assert ctypes.string_at(at, 4 * PAGE_SIZE) == bytes(4 * PAGE_SIZE)
    write_from(PID, at + 2 * PAGE_SIZE + 8, ctypes.addressof(copy) + 8, 8)
    assert ctypes.string_at(at + 2 * PAGE_SIZE, 24) == bytes(8) + bytes(range(8, 16)) + bytes(8)


def test_of_a_process_that_is_killed_meanwhile_nothing_is_waited_for(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (child := os.fork()):
        signal.pause()
    pwrite = os.pwrite

    def kill_first(fd: int, data: memoryview, offset: int) -> int:
        os.kill(child, signal.SIGKILL)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", kill_first)
    with pytest.raises(KernelError, match="ESRCH"):
        zero(child, at + PAGE_SIZE, at + 2 * PAGE_SIZE)
    os.waitpid(child, 0)


def test_where_nothing_is_mapped_it_fails() -> None:
    buffer = ctypes.create_string_buffer(8)
    with pytest.raises(KernelError):
        read_into(PID, 0, ctypes.addressof(buffer), 8)
    with pytest.raises(KernelError):
        write_from(PID, 0, ctypes.addressof(buffer), 8)
