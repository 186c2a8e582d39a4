"""The host's side of a drive: which files it takes, how, and who else may have them."""

import errno
import fcntl
import mmap
import os
from pathlib import Path

import pytest

from offmap.devices.virtio.disk import Disk
from offmap.devices.virtio.drive import DriveSpec, parse_drive
from offmap.errors import KernelError, OffmapError
from offmap.uapi.mman import F_OFD_SETLK, FLOCK


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(64 << 10))
    return path


# Which files


def test_a_drive_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=r"open of the drive .*ENOENT.*; make it first"):
        Disk(tmp_path / "none")


@pytest.mark.parametrize("path", [Path("/"), Path("/dev/null")])
def test_what_is_no_file(path: Path) -> None:
    with pytest.raises(OffmapError, match="neither a regular file nor a block device"):
        Disk(path)


def test_a_fifo_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OffmapError, match="neither a regular file"):
        Disk(tmp_path / "fifo")


@pytest.mark.parametrize("size", [0, 1, 511])
def test_shorter_than_a_sector(tmp_path: Path, size: int) -> None:
    (tmp_path / "short").write_bytes(bytes(size))
    with pytest.raises(OffmapError, match=f"has {size} bytes, which is less than a sector"):
        Disk(tmp_path / "short")


def test_the_last_piece_of_a_sector_is_not_shown(tmp_path: Path) -> None:
    (tmp_path / "odd").write_bytes(bytes(1300))
    said: list[str] = []
    with Disk(tmp_path / "odd", say=said.append) as disk:
        assert disk.size == 1024
    assert said == [
        f"the drive {tmp_path}/odd has 1300 bytes: the guest does not see the last 276, "
        "as they are no whole sector (512)"
    ]


def test_a_file_that_may_not_be_written(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def no_writing(path: Path, flags: int) -> int:
        if flags & os.O_RDWR:
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, flags)

    monkeypatch.setattr("os.open", no_writing)
    with pytest.raises(KernelError, match=r"EROFS.*; add readonly=on"):
        Disk(image)
    Disk(image, readonly=True).close()


def test_a_failed_opening_leaves_nothing_open(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"x")
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(3):
        with pytest.raises(OffmapError):
            Disk(tmp_path / "short")
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


# Locks


def test_two_guests_do_not_write_one_image(image: Path) -> None:
    with Disk(image), pytest.raises(OffmapError, match=r"in use: another guest has it open.*readonly=on"):
        Disk(image)
    with Disk(image), pytest.raises(OffmapError, match=r"in use: another guest writes to it"):
        Disk(image, readonly=True)
    reader = Disk(image, readonly=True)
    with reader, Disk(image, readonly=True), pytest.raises(OffmapError, match="this one would write to it"):
        Disk(image)
    Disk(image).close()  # all locks have gone


def test_qemus_locks_count(image: Path) -> None:
    """QEMU locks single bytes from 100 on (block/file-posix.c: RAW_LOCK_PERM_BASE) for reading."""
    fd = os.open(image, os.O_RDWR)
    try:
        fcntl.fcntl(fd, F_OFD_SETLK, FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 101, 1, 0))
        with pytest.raises(OffmapError, match="in use"):
            Disk(image)
    finally:
        os.close(fd)


def test_where_nothing_can_be_locked_it_is_said(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.fcntl", refuse)
    said: list[str] = []
    with Disk(image, say=said.append):
        pass
    assert len(said) == 1 and "cannot be locked (No locks available)" in said[0]


# Direct


def test_direct_io_reads_and_writes(image: Path) -> None:
    content = image.read_bytes()
    try:
        disk = Disk(image, direct=True)
    except KernelError as error:
        pytest.skip(f"direct I/O was not tested: {error}")
    with disk, mmap.mmap(-1, 8192) as memory:
        assert disk.logical_block_size in (512, 1024, 2048, 4096)
        view = memoryview(memory)
        disk.read([view[:4096]], 4096, 8192)
        assert bytes(view[:4096]) == content[8192:12288]
        disk.write([view[:4096]], 4096, 0)
        view.release()
    assert image.read_bytes()[:4096] == content[8192:12288]


def test_direct_io_by_the_bounce_buffer_needs_no_aligned_memory(image: Path) -> None:
    content = image.read_bytes()
    try:
        disk = Disk(image, direct=True, bounce=True)
    except KernelError as error:
        pytest.skip(f"direct I/O was not tested: {error}")
    with disk:
        there = bytearray(4096 + 7)
        disk.read([memoryview(there)[7:]], 4096, 4096)
        assert there[7:] == content[4096:8192]
        disk.write([memoryview(there)[7:107], memoryview(there)[107:]], 4096, 0)
    assert image.read_bytes()[:4096] == content[4096:8192]


def test_nothing_stays_in_the_bounce_buffer(image: Path) -> None:
    with Disk(image, bounce=True) as disk:
        there = bytearray(8192)
        disk.read([memoryview(there)], 8192, 4096)
        assert bytes(there) == image.read_bytes()[4096:12288]
        assert disk._bounce is not None and not any(disk._bounce[:])
        disk.write([memoryview(there)], 8192, 0)
        assert not any(disk._bounce[:])


# --drive


def test_drive_options() -> None:
    assert parse_drive("a.img") == DriveSpec(Path("a.img"))
    assert parse_drive("a.img,readonly=on,serial=X 1,direct=off,bounce=on") == DriveSpec(
        Path("a.img"), readonly=True, serial="X 1", bounce=True
    )


@pytest.mark.parametrize(
    "text", ["", ",readonly=on", "a,ro", "a,readonly", "a,readonly=yes", "a,b=c", "a,serial", "a,", "a,serial=é"]
)
def test_drive_options_that_there_are_not(text: str) -> None:
    with pytest.raises(OffmapError):
        parse_drive(text)


def test_a_serial_number_that_is_too_long() -> None:
    parse_drive("a,serial=" + "x" * 20)
    with pytest.raises(OffmapError, match="up to 20"):
        parse_drive("a,serial=" + "x" * 21)
