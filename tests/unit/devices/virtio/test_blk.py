"""virtio-blk: what each request does to the file, and what a driver hears when it cannot."""

import errno
import os
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offmap.devices.virtio.blk import Blk
from offmap.devices.virtio.disk import Disk
from offmap.memory.guest import GuestMemory
from offmap.patience import scaled
from offmap.uapi.virtio import blk as uapi
from offmap.uapi.virtio.config import VIRTIO_CONFIG_S_NEEDS_RESET

from .driver import NEXT, WRITE, Driver, guest_memory
from .transport import Wired

SECTORS = 256
OK, IOERR, UNSUPP = b"\0", b"\1", b"\2"
ALL_FEATURES = (1 << 64) - 1


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with guest_memory(2 << 20) as memory:
        yield memory


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(SECTORS * 512))
    return path


class Drive:
    """A drive, set up."""

    def __init__(self, memory: GuestMemory, image: Path, *, features: int = ALL_FEATURES, **options: bool) -> None:
        self.said: list[str] = []
        readonly = options.pop("readonly", False)
        self.disk = Disk(image, readonly=readonly, say=self.said.append, **options)
        device = Blk(self.disk, readonly=readonly, serial="serial 7", say=self.said.append)
        self.driver = Driver(memory, 64)
        self.wired = Wired(device, self.driver).set_up(features & ~(3 << 28))

    def request(self, kind: int, sector: int, *buffers: bytes | int) -> tuple[bytes, bytes]:
        """(data, status) of one request; `buffers` come behind the header."""
        return self.raw(struct.pack("<IIQ", kind, 0, sector), *buffers, 1)

    def raw(self, *buffers: bytes | int) -> tuple[bytes, bytes]:
        self.driver.add(*buffers)
        self.wired.kick()
        whole = self.driver.whole_result()
        return whole[:-1], whole[-1:]

    def ranges(self, kind: int, *ranges: tuple[int, int, int]) -> bytes:
        return self.request(kind, 0, b"".join(struct.pack("<QII", *r) for r in ranges))[1]


@pytest.fixture
def drive(memory: GuestMemory, image: Path) -> Iterator[Drive]:
    drive = Drive(memory, image)
    with drive.wired:
        yield drive


def test_configuration(drive: Drive) -> None:
    config = uapi.virtio_blk_config.from_buffer_copy(drive.wired.page[0x100:0x200])
    assert config.capacity == SECTORS
    assert (config.blk_size, config.physical_block_exp, config.min_io_size) == (512, 3, 8)
    assert config.seg_max == 510
    assert (config.max_discard_seg, config.max_write_zeroes_seg) == (64, 1)
    offered = drive.wired.offered()
    for bit in (uapi.VIRTIO_BLK_F_FLUSH, uapi.VIRTIO_BLK_F_DISCARD, uapi.VIRTIO_BLK_F_WRITE_ZEROES):
        assert offered >> bit & 1
    assert not offered >> uapi.VIRTIO_BLK_F_RO & 1


def test_read(drive: Drive, image: Path) -> None:
    content = image.read_bytes()
    assert drive.request(uapi.VIRTIO_BLK_T_IN, 3, 512) == (content[3 * 512 : 4 * 512], OK)
    assert drive.request(uapi.VIRTIO_BLK_T_IN, 0, 512, 4096, 1536) == (content[: 12 * 512], OK)
    assert drive.request(uapi.VIRTIO_BLK_T_IN, SECTORS - 1, 512) == (content[-512:], OK)


def test_write(drive: Drive, image: Path) -> None:
    content = bytearray(image.read_bytes())
    data = os.urandom(6 * 512)
    assert drive.request(uapi.VIRTIO_BLK_T_OUT, 250, data[:100], data[100:]) == (b"", OK)
    content[250 * 512 :] = data
    assert image.read_bytes() == content
    assert drive.request(uapi.VIRTIO_BLK_T_FLUSH, 0) == (b"", OK)


def test_the_used_length_counts_the_status(drive: Drive) -> None:
    drive.driver.add(struct.pack("<IIQ", 0, 0, 0), 512, 1)
    drive.wired.kick()
    taken = drive.driver.take()
    assert taken is not None and taken[1] == 513


def test_any_layout(drive: Drive, image: Path) -> None:
    """2.7.4: a device must not care how a driver cuts a request into descriptors."""
    content = bytearray(image.read_bytes())
    header = struct.pack("<IIQ", uapi.VIRTIO_BLK_T_IN, 0, 2)
    assert drive.raw(header[:5], header[5:9], header[9:], 512 + 1) == (bytes(content[1024:1536]), OK)
    assert drive.raw(header, 100, 412 + 1) == (bytes(content[1024:1536]), OK)
    data = os.urandom(1024)
    header = struct.pack("<IIQ", uapi.VIRTIO_BLK_T_OUT, 0, 7)
    assert drive.raw(header[:15], header[15:] + data[:500], data[500:], 1) == (b"", OK)
    assert drive.raw(header + data, 1) == (b"", OK)
    content[7 * 512 : 9 * 512] = data
    assert image.read_bytes() == content


@pytest.mark.parametrize("kind", [uapi.VIRTIO_BLK_T_IN, uapi.VIRTIO_BLK_T_OUT])
@pytest.mark.parametrize(
    ("sector", "size"),
    [(SECTORS, 512), (SECTORS - 1, 1024), (1 << 63, 512), ((1 << 64) - 1, 512), (0, 511), (0, 513), (0, 1)],
)
def test_what_is_not_on_the_drive(drive: Drive, image: Path, kind: int, sector: int, size: int) -> None:
    before = image.read_bytes()
    buffers = (size,) if kind == uapi.VIRTIO_BLK_T_IN else (bytes(size),)
    assert drive.request(kind, sector, *buffers)[1] == IOERR
    assert image.read_bytes() == before
    assert drive.said == drive.wired.said == []


def test_requests_of_no_data(drive: Drive) -> None:
    assert drive.request(uapi.VIRTIO_BLK_T_IN, 0)[1] == OK
    assert drive.request(uapi.VIRTIO_BLK_T_OUT, SECTORS)[1] == OK
    assert drive.ranges(uapi.VIRTIO_BLK_T_DISCARD) == IOERR


@pytest.mark.parametrize("kind", [2, 3, 5, 9, 10, 12, 14, 0x80000000, 0xFFFFFFFF])
def test_kinds_that_there_are_not(drive: Drive, kind: int) -> None:
    assert drive.request(kind, 0, 512)[1] == UNSUPP


@pytest.mark.parametrize("buffers", [(b"short", 1), (b"x" * 15, 512, 1), (bytes(16),), (1,)])
def test_requests_that_are_none(drive: Drive, buffers: tuple[bytes | int, ...]) -> None:
    drive.driver.add(*buffers)
    drive.wired.kick()
    assert drive.wired.status & VIRTIO_CONFIG_S_NEEDS_RESET
    assert len(drive.wired.said) == 1
    assert drive.driver.used_idx() == 0


def test_serial(drive: Drive) -> None:
    assert drive.request(uapi.VIRTIO_BLK_T_GET_ID, 0, 20) == (b"serial 7".ljust(20, b"\0"), OK)
    assert drive.request(uapi.VIRTIO_BLK_T_GET_ID, 0, 5, 15) == (b"serial 7".ljust(20, b"\0"), OK)
    assert drive.request(uapi.VIRTIO_BLK_T_GET_ID, 0, 19)[1] == IOERR


def test_discard(drive: Drive, image: Path) -> None:
    content = bytearray(image.read_bytes())
    before = image.stat().st_blocks
    assert drive.ranges(uapi.VIRTIO_BLK_T_DISCARD, (8, 8, 0), (64, 16, 0)) == OK
    content[8 * 512 : 16 * 512] = bytes(8 * 512)
    content[64 * 512 : 80 * 512] = bytes(16 * 512)
    assert image.read_bytes() == content
    assert image.stat().st_blocks < before


@pytest.mark.parametrize("unmap", [0, 1])
def test_write_zeroes(drive: Drive, image: Path, unmap: int) -> None:
    content = bytearray(image.read_bytes())
    assert drive.ranges(uapi.VIRTIO_BLK_T_WRITE_ZEROES, (5, 3, unmap)) == OK
    content[5 * 512 : 8 * 512] = bytes(3 * 512)
    assert image.read_bytes() == content


def test_zeroes_are_written_where_the_file_system_knows_no_better(
    drive: Drive, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "")

    monkeypatch.setattr("offmap.devices.virtio.disk.fallocate", refuse)
    content = bytearray(image.read_bytes())
    assert drive.ranges(uapi.VIRTIO_BLK_T_WRITE_ZEROES, (5, 30, 1)) == OK
    content[5 * 512 : 35 * 512] = bytes(30 * 512)
    assert image.read_bytes() == content
    assert drive.ranges(uapi.VIRTIO_BLK_T_DISCARD, (0, 8, 0)) == UNSUPP
    assert image.read_bytes() == content
    assert drive.said == []


@pytest.mark.parametrize("end", ["reset", "stop"])
def test_zeroes_are_written_in_pieces_between_which_the_device_can_be_ended(
    memory: GuestMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "")

    monkeypatch.setattr("offmap.devices.virtio.disk.fallocate", refuse)
    monkeypatch.setattr("offmap.devices.virtio.disk._MOST_WRITTEN", 4096)
    path = tmp_path / "large"
    path.write_bytes(b"x" * (1 << 20))
    with_reset = threading.Event()
    drive = Drive(memory, path)
    write_zeroes = drive.disk.write_zeroes
    pieces: list[int] = []

    def counted(offset: int, size: int, *, unmap: bool) -> tuple[int, bool]:
        pieces.append(size)
        if len(pieces) == 3:
            transport = drive.wired.transport
            transport.worker.post(drive.wired.device.reset if end == "reset" else lambda: transport._stop_queue(0))
            with_reset.set()
        return write_zeroes(offset, size, unmap=unmap)

    monkeypatch.setattr(drive.disk, "write_zeroes", counted)
    drive.driver.add(struct.pack("<IIQ", uapi.VIRTIO_BLK_T_WRITE_ZEROES, 0, 0), struct.pack("<QII", 0, 2048, 0), 1)
    drive.wired.kick()
    assert with_reset.wait(scaled(10))
    drive.wired.settle()
    drive.wired.kick()
    drive.wired.settle()
    assert len(pieces) <= 4, "nobody waited for the rest of 256"
    drive.wired.close()


@pytest.mark.parametrize(
    ("kind", "ranges", "status"),
    [
        (uapi.VIRTIO_BLK_T_DISCARD, [(0, 8, 1)], UNSUPP),  # "unmap" of a discard
        (uapi.VIRTIO_BLK_T_DISCARD, [(0, 8, 2)], UNSUPP),
        (uapi.VIRTIO_BLK_T_WRITE_ZEROES, [(0, 8, 2)], UNSUPP),
        (uapi.VIRTIO_BLK_T_DISCARD, [(SECTORS - 1, 2, 0)], IOERR),
        (uapi.VIRTIO_BLK_T_DISCARD, [((1 << 64) - 1, 2, 0)], IOERR),
        (uapi.VIRTIO_BLK_T_WRITE_ZEROES, [(0, 0xFFFFFFFF, 0)], IOERR),
        (uapi.VIRTIO_BLK_T_DISCARD, [(0, 8, 0), (SECTORS, 1, 0)], IOERR),  # then not the first either
        (uapi.VIRTIO_BLK_T_DISCARD, [(0, 1, 0)] * 65, IOERR),
        (uapi.VIRTIO_BLK_T_WRITE_ZEROES, [(0, 1, 0)] * 2, IOERR),  # overlapping ones would be endless work
    ],
)
def test_ranges_that_cannot_be(
    drive: Drive, image: Path, kind: int, ranges: list[tuple[int, int, int]], status: bytes
) -> None:
    before = image.read_bytes()
    assert drive.ranges(kind, *ranges) == status
    assert image.read_bytes() == before


def test_half_a_range(drive: Drive) -> None:
    assert drive.request(uapi.VIRTIO_BLK_T_DISCARD, 0, bytes(24))[1] == IOERR


def test_readonly(memory: GuestMemory, image: Path) -> None:
    image.chmod(0o444)
    before = image.read_bytes()
    drive = Drive(memory, image, readonly=True)
    with drive.wired:
        offered = drive.wired.offered()
        assert offered >> uapi.VIRTIO_BLK_F_RO & 1
        assert not offered >> uapi.VIRTIO_BLK_F_DISCARD & 1
        assert drive.request(uapi.VIRTIO_BLK_T_IN, 0, 512) == (before[:512], OK)
        assert drive.request(uapi.VIRTIO_BLK_T_OUT, 0, bytes(512))[1] == IOERR
        assert drive.ranges(uapi.VIRTIO_BLK_T_DISCARD, (0, 8, 0)) == IOERR
        assert drive.ranges(uapi.VIRTIO_BLK_T_WRITE_ZEROES, (0, 8, 0)) == IOERR
        assert drive.request(uapi.VIRTIO_BLK_T_FLUSH, 0)[1] == OK
    assert image.read_bytes() == before


def test_a_driver_without_flush_gets_its_data_onto_the_disk(
    memory: GuestMemory, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr("os.fdatasync", synced.append)
    drive = Drive(memory, image, features=0)
    with drive.wired:
        assert drive.request(uapi.VIRTIO_BLK_T_OUT, 0, bytes(512))[1] == OK
        assert len(synced) == 1
    drive = Drive(memory, image)
    with drive.wired:
        assert drive.request(uapi.VIRTIO_BLK_T_OUT, 0, bytes(512))[1] == OK
        assert len(synced) == 1
        assert drive.request(uapi.VIRTIO_BLK_T_FLUSH, 0)[1] == OK
        assert len(synced) == 2


def test_a_file_that_becomes_shorter(drive: Drive, image: Path) -> None:
    os.truncate(image, 1000)
    for _ in range(3):
        assert drive.request(uapi.VIRTIO_BLK_T_IN, 2, 512)[1] == IOERR
    assert drive.request(uapi.VIRTIO_BLK_T_IN, 1, 512)[1] == IOERR
    assert drive.request(uapi.VIRTIO_BLK_T_IN, 0, 512)[1] == OK
    assert len(drive.said) == 1 and "has become shorter" in drive.said[0]
    assert drive.wired.said == []


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.ENODEV, errno.ENXIO, errno.EINVAL])
def test_errors_of_the_host_are_the_requests_and_one_line(
    drive: Drive, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as broken:
        broken.setattr("os.preadv", fail)
        broken.setattr("os.pwritev", fail)
        broken.setattr("os.fdatasync", fail)
        for _ in range(3):
            assert drive.request(uapi.VIRTIO_BLK_T_OUT, 0, bytes(512))[1] == IOERR
            assert drive.request(uapi.VIRTIO_BLK_T_IN, 0, 512)[1] == IOERR
            assert drive.request(uapi.VIRTIO_BLK_T_FLUSH, 0)[1] == IOERR
    assert len(drive.said) == 3
    assert all(os.strerror(number) in line for line in drive.said)
    assert drive.request(uapi.VIRTIO_BLK_T_IN, 0, 512)[1] == OK


def test_a_disk_that_stalls_holds_up_its_own_drive_only(
    memory: GuestMemory, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.write_bytes(os.urandom(4096))
    stalled, going = threading.Event(), threading.Event()
    real = os.preadv
    with guest_memory(2 << 20) as more_memory:
        slow, fast = Drive(memory, image), Drive(more_memory, other)

        def call(fd: int, views: list[memoryview], offset: int) -> int:
            if fd == slow.disk.fd:
                stalled.set()
                assert going.wait(scaled(10))
            return real(fd, views, offset)

        monkeypatch.setattr("os.preadv", call)
        with slow.wired, fast.wired:
            slow.driver.add(struct.pack("<IIQ", uapi.VIRTIO_BLK_T_IN, 0, 0), 512, 1)
            os.eventfd_write(slow.wired.kicks[0], 1)
            assert stalled.wait(scaled(10))
            assert fast.request(uapi.VIRTIO_BLK_T_IN, 0, 512) == (other.read_bytes()[:512], OK)
            assert slow.driver.used_idx() == 0
            going.set()
            slow.wired.settle()
            assert slow.driver.whole_result() == image.read_bytes()[:512] + OK


def in_small_steps(real: Callable[..., int]) -> Callable[..., int]:
    """A system call that moves no more than 700 bytes at a time."""

    def call(fd: int, views: list[memoryview], offset: int) -> int:
        room = 700
        parts = []
        for view in views:
            parts.append(view[:room])
            room -= len(parts[-1])
        return real(fd, parts, offset)

    return call


def test_a_drive_that_feeds_its_own_queue_can_be_stopped(memory: GuestMemory, tmp_path: Path) -> None:
    """Each sector is the next request: its header, and an available index that is one higher. No vCPU takes part."""
    count = 1 << 16  # so that both wrap at once
    image = tmp_path / "program"
    with image.open("wb") as file:
        for sector in range(count):
            ring = struct.pack("<HHHHHH", 0, sector + 2 & 0xFFFF, 0, 0, 0, 0)
            header = struct.pack("<IIQ", uapi.VIRTIO_BLK_T_IN, 0, (sector + 1) % count)
            file.write((ring.ljust(256, b"\0") + header).ljust(512, b"\0"))
    driver = Driver(memory, 4)
    wired = Wired(Blk(Disk(image)), driver).set_up()
    memory.write(driver.avail + 256, struct.pack("<IIQ", uapi.VIRTIO_BLK_T_IN, 0, 0))
    driver.descriptor(0, driver.avail + 256, 16, NEXT, 1)
    driver.descriptor(1, driver.avail, 512, NEXT | WRITE, 2)
    driver.descriptor(2, 0x40000, 1, WRITE)
    driver.make_available(0)
    os.eventfd_write(wired.kicks[0], 1)
    while driver.used_idx() < 1000:
        wired.settle()
    stopping = threading.Thread(target=wired.close, daemon=True)
    stopping.start()
    stopping.join(scaled(10))
    assert not stopping.is_alive()


def test_calls_that_move_a_part(drive: Drive, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray(image.read_bytes())
    monkeypatch.setattr("os.preadv", in_small_steps(os.preadv))
    monkeypatch.setattr("os.pwritev", in_small_steps(os.pwritev))
    assert drive.request(uapi.VIRTIO_BLK_T_IN, 1, 512, 1024, 2560) == (bytes(content[512 : 9 * 512]), OK)
    data = os.urandom(4096)
    assert drive.request(uapi.VIRTIO_BLK_T_OUT, 3, data[:100], data[100:3000], data[3000:])[1] == OK
    content[3 * 512 : 11 * 512] = data
    assert image.read_bytes() == content


@pytest.mark.parametrize("bounce", [False, True])
def test_data_that_has_to_bounce(
    memory: GuestMemory, image: Path, monkeypatch: pytest.MonkeyPatch, bounce: bool
) -> None:
    """By request, or because the kernel cannot pin the guest's pages: seen here as EFAULT for memory of the guest."""
    content = bytearray(image.read_bytes())
    drive = Drive(memory, image, bounce=bounce)
    backing = memory.backings[0].view.obj
    real_preadv, real_pwritev = os.preadv, os.pwritev

    def pins(real: Callable[..., int]) -> Callable[..., int]:
        def call(fd: int, views: list[memoryview], offset: int) -> int:
            if any(view.obj is backing for view in views):
                raise OSError(errno.EFAULT, "")
            return real(fd, views, offset)

        return call

    monkeypatch.setattr("os.preadv", pins(real_preadv))
    monkeypatch.setattr("os.pwritev", pins(real_pwritev))
    with drive.wired:
        for _ in range(2):
            assert drive.request(uapi.VIRTIO_BLK_T_IN, 1, 512, 1024, 2560) == (bytes(content[512 : 9 * 512]), OK)
        data = os.urandom(4096)
        assert drive.request(uapi.VIRTIO_BLK_T_OUT, 3, data[:100], data[100:3000], data[3000:])[1] == OK
    content[3 * 512 : 11 * 512] = data
    assert image.read_bytes() == content
    assert len(drive.said) == (0 if bounce else 1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0, 1, 1, 4, 8, 11, 13, 13, 7]),
            st.integers(0, SECTORS + 2) | st.integers(0, (1 << 64) - 1),
            st.lists(st.binary(max_size=1100) | st.integers(1, 1100), max_size=4),
        ),
        max_size=20,
    )
)
def test_random_requests_end_in_a_status_or_a_reset(
    tmp_path_factory: pytest.TempPathFactory, requests: list[tuple[int, int, list[bytes | int]]]
) -> None:
    image = tmp_path_factory.mktemp("blk") / "image"
    image.write_bytes(bytes(SECTORS * 512))
    with guest_memory(2 << 20) as memory:
        drive = Drive(memory, image)
        with drive.wired:
            for kind, sector, buffers in requests:
                ordered = sorted(buffers, key=lambda b: isinstance(b, int))
                drive.driver.add(struct.pack("<IIQ", kind, 0, sector), *ordered, 1)
                drive.wired.kick()
                taken = drive.driver.take()
                assert taken is not None
                address, size = drive.driver.rooms[taken[0]][-1]
                assert memory.read(address + size - 1, 1) in (OK, IOERR, UNSUPP)
            assert not drive.wired.status & VIRTIO_CONFIG_S_NEEDS_RESET
        assert image.stat().st_size == SECTORS * 512
        assert drive.wired.said == []


@pytest.mark.parametrize("kind", [uapi.VIRTIO_BLK_T_IN, uapi.VIRTIO_BLK_T_OUT])
@pytest.mark.parametrize("fails", [False, True])
def test_much_data_is_moved_in_pieces_between_which_others_have_their_turn(
    drive: Drive, image: Path, monkeypatch: pytest.MonkeyPatch, kind: int, fails: bool
) -> None:
    monkeypatch.setattr("offmap.devices.virtio.blk._MOST_MOVED", 4096)
    turns: list[int] = []
    worker = drive.wired.transport.worker
    name = "read" if kind == uapi.VIRTIO_BLK_T_IN else "write"
    move = getattr(drive.disk, name)

    def counted(views: list[memoryview], size: int, offset: int, **more: bool) -> None:
        turns.append(size)
        worker.post(lambda: turns.append(0))
        if fails and len(turns) > 2:
            raise OSError(errno.EIO, "")
        move(views, size, offset, **more)

    monkeypatch.setattr(drive.disk, name, counted)
    before = image.read_bytes()
    data = os.urandom(3 * 4096 + 512)
    header = struct.pack("<IIQ", kind, 0, 2)
    drive.driver.add(header, *((512, 3 * 4096) if kind == uapi.VIRTIO_BLK_T_IN else (data[:512], data[512:])), 1)
    for _ in range(6):
        drive.wired.kick()
    drive.wired.settle()
    whole = drive.driver.whole_result()
    assert whole[-1:] == (IOERR if fails else OK)
    assert turns == [4096, 0, 4096, 0] if fails else [4096, 0, 4096, 0, 4096, 0, 512, 0]
    if not fails and kind == uapi.VIRTIO_BLK_T_IN:
        assert whole[:-1] == before[1024 : 1024 + len(data)]
    elif not fails:
        assert image.read_bytes() == before[:1024] + data + before[1024 + len(data) :]
