"""What this process's own /proc shows, without root: files of memory, and what they hold."""

import ctypes
import mmap
import os
import subprocess
import sys
import time

import numpy as np

from offmap.audit.process import Mapping, Process, find_mapping, own_start
from offmap.audit.residency import Backing, allocated_bytes, open_backing, resident_frames

PAGE = 4096


def address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def mapping_of(process: Process, memory: mmap.mmap) -> Mapping:
    found = find_mapping(process.maps(), address(memory))
    assert found is not None
    return found


def kind_of(process: Process, mapping: Mapping) -> Backing:
    with open_backing(process, mapping) as (kind, _):
        return kind


def test_memfd_is_told_from_a_device_and_counts_its_pages() -> None:
    fd = os.memfd_create("ram")
    try:
        os.ftruncate(fd, 16 * PAGE)
        with mmap.mmap(fd, 16 * PAGE) as memory, Process(os.getpid()) as process:
            memory[3 * PAGE] = 1
            mapping = mapping_of(process, memory)
            assert kind_of(process, mapping) is Backing.SHMEM
            assert allocated_bytes(process, mapping) == PAGE
    finally:
        os.close(fd)


def test_anonymous_memory_has_no_file() -> None:
    with (
        mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory,
        Process(os.getpid()) as process,
    ):
        assert kind_of(process, mapping_of(process, memory)) is Backing.OTHER


def test_resident_pages_of_a_file_are_told_from_holes() -> None:
    fd = os.memfd_create("ram")
    try:
        os.ftruncate(fd, 16 * PAGE)
        os.pwrite(fd, b"x", 5 * PAGE)
        os.pwrite(fd, b"x", 9 * PAGE)
        wanted = np.ones(12, dtype=np.bool_)
        wanted[5] = False
        _, resident, empty = resident_frames(fd, 4 * PAGE, 12, wanted, counts_holes=True)
        assert np.flatnonzero(resident).tolist() == [1]
        assert np.flatnonzero(wanted & ~empty).tolist() == [1]
        status = os.fstat(fd)
        assert status.st_blocks * 512 == 2 * PAGE  # looking has brought nothing in
    finally:
        os.close(fd)


def test_process_shows_its_name_and_descriptors() -> None:
    fd = os.memfd_create("offmap-test")
    try:
        with Process(os.getpid()) as process:
            assert process.name()
            assert process.descriptors()[fd] == "/memfd:offmap-test (deleted)"
    finally:
        os.close(fd)


def test_own_start_is_past_and_after_the_parents() -> None:
    assert 0 < own_start() <= time.monotonic_ns()
    program = "from offmap.audit.process import own_start; print(own_start())"
    before = time.monotonic_ns()
    child = int(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)
    tick = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    assert before - tick <= child <= time.monotonic_ns()
