"""The balloon: what the guest gives up really leaves, and what a hostile one names stays where it is."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offmap.devices.virtio.balloon import Balloon, BalloonSpec, parse_balloon
from offmap.devices.virtio.device import Surroundings
from offmap.devices.virtio.dma import DriverError
from offmap.errors import OffmapError
from offmap.kvm import Vm
from offmap.memory.anon import Anon
from offmap.memory.backing import Backing
from offmap.memory.guest import GuestMemory
from offmap.memory.memfd import map_memfd
from offmap.memory.secretmem import Secretmem
from offmap.uapi.page import PAGE_SIZE
from offmap.uapi.virtio import balloon as uapi
from offmap.uapi.virtio.ring import VRING_DESC_F_NEXT

from .bench import Bench

INFLATE, DEFLATE, REPORT = range(3)
SIZE = 20 << 20
NOTHING = cast(Vm, None)


def private() -> Backing:
    return Anon().allocate(NOTHING, SIZE)[0]


def shared() -> Backing:
    return map_memfd("memfd", SIZE, 0)


class Guest:
    def __init__(self, backing: Backing) -> None:
        self.said: list[str] = []
        self.memory = GuestMemory([backing])
        self.balloon = Balloon(self.memory, 100, self.said.append)
        self.bench = Bench(self.balloon, memory=self.memory)
        self.base = SIZE // 2

    def inflate(self, *pages: int) -> None:
        self.bench.drivers[INFLATE].add(struct.pack(f"<{len(pages)}I", *pages))
        self.balloon.handle(INFLATE)

    def resident(self, page: int) -> bool:
        """Whether the host still has a frame for it, as the process's own page tables say (pagemap, bit 63 or 62)."""
        address = self.memory.backings[0].address + page * PAGE_SIZE
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
            pagemap.seek(address // PAGE_SIZE * 8)
            return bool(int.from_bytes(pagemap.read(8), "little") >> 62)


@pytest.fixture(params=[private, shared])
def guest(request: pytest.FixtureRequest) -> Iterator[Guest]:
    guest = Guest(request.param())
    with guest.memory, guest.bench:
        yield guest


def test_what_is_inflated_leaves_and_comes_back_empty(guest: Guest) -> None:
    pages = [3000, 3001, 3002, 3500]
    for page in [*pages, 3003]:
        guest.memory.write(page * PAGE_SIZE, b"secret")
        assert guest.resident(page)
    guest.inflate(*pages[::-1])
    assert not any(guest.resident(page) for page in pages)
    assert guest.resident(3003)
    assert guest.balloon.discarded == 4 * PAGE_SIZE
    assert guest.bench.drivers[INFLATE].used_idx() == 1
    assert guest.memory.read(3000 * PAGE_SIZE, 6) == bytes(6)
    assert guest.memory.read(3003 * PAGE_SIZE, 6) == b"secret"
    guest.bench.drivers[DEFLATE].add(struct.pack("<I", 3000))
    guest.balloon.handle(DEFLATE)
    assert guest.bench.drivers[DEFLATE].used_idx() == 1


def test_the_hosts_share_of_a_memfd_shrinks() -> None:
    guest = Guest(shared())
    with guest.memory, guest.bench:
        guest.memory.write(3000 * PAGE_SIZE, bytes(256 * PAGE_SIZE))
        before = shmem_kib()
        guest.inflate(*range(3000, 3256))
        assert before - shmem_kib() >= 900, "of 1024 KiB (others use shared memory too)"


def shmem_kib() -> int:
    return int(
        next(
            line.split()[1]
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("RssShmem")
        )
    )


@pytest.mark.parametrize("number", [REPORT, 4])
def test_reported_pages_leave(guest: Guest, number: int) -> None:
    driver = guest.bench.drivers[number]
    driver.add(3 * PAGE_SIZE - 100)
    ((address, _),) = driver.rooms[0]
    page = -(-address // PAGE_SIZE)
    assert guest.resident(page)
    guest.balloon.handle(number)
    assert not guest.resident(page)
    assert guest.balloon.discarded == 2 * PAGE_SIZE, "only whole pages"
    assert driver.take() == (0, 0)


@pytest.mark.parametrize(
    "content", [struct.pack("<I", SIZE // PAGE_SIZE), struct.pack("<I", (1 << 32) - 1), b"\1\0\0", b"\1\0\0\0\0"]
)
def test_pages_that_are_none(guest: Guest, content: bytes) -> None:
    guest.bench.drivers[INFLATE].add(content)
    with pytest.raises(DriverError):
        guest.balloon.handle(INFLATE)
    assert guest.balloon.discarded == 0


def test_one_buffer_names_no_more_pages_than_are_soon_done_with(guest: Guest) -> None:
    """The numbers of a whole RAM full of numbers, many times over, would keep the thread busy for hours."""
    driver = guest.bench.drivers[INFLATE]
    for number in range(driver.size):
        more = number + 1 < driver.size
        driver.descriptor(number, 0, SIZE, VRING_DESC_F_NEXT if more else 0, number + 1)
    driver.make_available(0)
    with pytest.raises(DriverError, match="pages in one buffer"):
        guest.balloon.handle(INFLATE)
    assert guest.balloon.discarded == 0


def test_target_and_size(guest: Guest) -> None:
    config = uapi.virtio_balloon_config.from_buffer_copy(guest.balloon.config())
    assert (config.num_pages, config.actual) == (100, 0)
    guest.balloon.write_config(4, struct.pack("<I", 77))
    guest.balloon.write_config(0, struct.pack("<I", 5))
    guest.balloon.write_config(5, b"\xff")
    config = uapi.virtio_balloon_config.from_buffer_copy(guest.balloon.config())
    assert (config.num_pages, config.actual) == (100, 77)


def test_reports_come_by_the_queue_of_the_specification_too(guest: Guest) -> None:
    guest.bench.drivers[4].add(3 * PAGE_SIZE - 100)
    guest.balloon.handle(4)
    assert guest.balloon.discarded == 2 * PAGE_SIZE


def test_a_kernel_that_refuses_is_reported_once() -> None:
    guest = Guest(Backing("test", -1, SIZE))  # shared anonymous memory whose backend says nothing of discarding
    with guest.memory, guest.bench:
        guest.inflate(3000)
        guest.inflate(3001)
        assert len(guest.said) == 1 and "may stay in the host's RAM" in guest.said[0]
        assert guest.balloon.discarded == 0


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.lists(st.one_of(st.binary(max_size=40), st.integers(0, 9000)), max_size=4))
    )
)
@settings(max_examples=60)
def test_whatever_the_driver_does_the_device_answers_or_raises_driver_error(
    chains: list[tuple[int, list[bytes | int]]],
) -> None:
    guest = Guest(private())
    with guest.memory, guest.bench:
        for queue, buffers in chains:
            if not buffers:
                continue
            guest.bench.drivers[queue].add(*buffers)
            try:
                guest.balloon.handle(queue)
            except DriverError:
                guest.balloon.reset()
                guest.bench.activate()


def test_options() -> None:
    assert parse_balloon("size=64M") == BalloonSpec(64 << 20)
    assert parse_balloon("size=0") == BalloonSpec(0)
    for text in ("", "64M", "size=", "size=1", "size=x", "target=1M"):
        with pytest.raises(OffmapError):
            parse_balloon(text)


def test_ram_that_cannot_be_given_back_is_refused() -> None:
    with GuestMemory([Backing("test", -1, SIZE)]) as memory, pytest.raises(OffmapError, match="page by page"):
        BalloonSpec(4096).build(Surroundings(memory, Secretmem, NOTHING))
    with GuestMemory([shared()]) as memory:
        with pytest.raises(OffmapError, match="cannot give up 20 MiB"):
            BalloonSpec(SIZE).build(Surroundings(memory, Anon, NOTHING))
        assert BalloonSpec(4096).build(Surroundings(memory, Anon, NOTHING)).features
