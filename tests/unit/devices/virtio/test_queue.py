"""The split virtqueue, against honest drivers and hostile ones."""

import random
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offmap.devices.virtio.dma import DriverError
from offmap.devices.virtio.queue import Chain, Queue, _table
from offmap.memory.guest import GuestMemory
from offmap.memory.iomem import PhysicalRange

from .driver import AVAIL, DESC, INDIRECT, NEXT, USED, WRITE, Driver, guest_memory

SIZE = 1 << 20


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with guest_memory(SIZE) as memory:
        yield memory


def serve(queue: Queue) -> list[Chain]:
    """Answer every buffer with as many bytes as it has room for."""
    served = []
    for chain in queue.chains():
        for view in chain.writable:
            view[:] = b"\xaa" * len(view)
        queue.push(chain, chain.writable_bytes)
        served.append(chain)
    queue.notify()
    return served


# An honest driver


@pytest.mark.parametrize("indirect", [False, True])
def test_a_chain_is_views_into_guest_memory(memory: GuestMemory, indirect: bool) -> None:
    driver = Driver(memory, indirect=indirect)
    queue = driver.queue()
    driver.add(b"header", b"more", 3, 5)
    (chain,) = serve(queue)
    assert [bytes(view) for view in chain.readable] == [b"header", b"more"]
    assert (chain.readable_bytes, chain.writable_bytes) == (10, 8)
    assert driver.result() == b"\xaa" * 8
    assert driver.interrupts == 1
    assert queue.pop() is None


def test_a_table_may_end_a_chain_of_plain_descriptors(memory: GuestMemory) -> None:
    """2.7.5.3.2: zero or more normal descriptors, then one that refers to a table."""
    driver = Driver(memory, indirect=True)
    queue = driver.queue()
    driver.descriptor(0, 0x40000, 4, NEXT, 1)
    driver.descriptor(1, 0x20000, 16, INDIRECT | WRITE)
    driver.descriptor(0, 0x50000, 8, WRITE, table=0x20000)
    driver.make_available(0)
    (chain,) = serve(queue)
    assert (chain.readable_bytes, chain.writable_bytes) == (4, 8)


@pytest.mark.parametrize("event_idx", [False, True])
def test_indices_wrap(memory: GuestMemory, event_idx: bool) -> None:
    driver = Driver(memory, size=4, event_idx=event_idx)
    queue = driver.queue()
    for number in range(70000):
        head = number % 4
        if number < 4:
            driver.descriptor(head, 0x40000 + head, 1, WRITE)
        driver.make_available(head)
        chain = queue.pop()
        assert chain is not None
        queue.push(chain, 1)
        queue.notify()
        if event_idx:
            assert not queue.rearm()
        if number % 1000 == 0 or number > 65530:
            assert driver.used_idx() == number + 1 & 0xFFFF
            assert not event_idx or driver.avail_event() == number + 1 & 0xFFFF
    assert queue.pop() is None


def test_a_driver_that_wants_no_interrupt_gets_none(memory: GuestMemory) -> None:
    driver = Driver(memory)
    queue = driver.queue()
    memory.write(AVAIL, struct.pack("<H", 1))  # VRING_AVAIL_F_NO_INTERRUPT
    driver.add(1)
    serve(queue)
    assert driver.interrupts == 0
    memory.write(AVAIL, struct.pack("<H", 0))
    queue.notify()
    assert driver.interrupts == 0  # nothing new
    driver.add(1)
    serve(queue)
    assert driver.interrupts == 1


def test_the_interrupt_comes_where_the_driver_wants_it(memory: GuestMemory) -> None:
    driver = Driver(memory, event_idx=True)
    queue = driver.queue()
    driver.set_used_event(1)  # after the second
    driver.add(1)
    serve(queue)
    assert driver.interrupts == 0
    driver.add(1)
    serve(queue)
    assert driver.interrupts == 1
    driver.set_used_event(3)
    for _ in range(3):  # 2, 3, 4: in one batch
        driver.add(1)
    serve(queue)
    assert driver.interrupts == 2
    driver.set_used_event(4)  # long past: none
    driver.add(1)
    serve(queue)
    assert driver.interrupts == 2


def test_a_buffer_that_comes_while_the_kick_is_being_asked_for_is_not_lost(memory: GuestMemory) -> None:
    driver = Driver(memory, event_idx=True)
    queue = driver.queue()
    driver.add(1)
    chain = queue.pop()
    assert chain is not None
    driver.add(1)
    assert queue.rearm()
    assert driver.avail_event() == 1


def test_chains_are_given_while_the_driver_adds_more(memory: GuestMemory) -> None:
    driver = Driver(memory)
    queue = driver.queue()
    driver.add(1)
    seen = 0
    for chain in queue.chains():
        seen += 1
        queue.push(chain, 0)
        if seen < 5:
            driver.add(1)
    assert seen == 5


def test_a_driver_that_never_stops_adding_leaves_the_thread_to_others(memory: GuestMemory) -> None:
    driver = Driver(memory)
    asked: list[None] = []
    queue = driver.queue(again=lambda: asked.append(None))
    driver.add(1)
    for served, chain in enumerate(queue.chains()):
        queue.push(chain, 0)
        driver.add(1)
        assert served < 10_000
    assert len(asked) == 1
    assert queue.pop() is not None, "nothing is lost"


def test_a_device_that_waits_for_its_host_leaves_the_thread_to_others(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("offmap.devices.virtio.queue.monotonic", lambda: now[0])
    driver = Driver(memory)
    again: list[None] = []
    queue = driver.queue(again=lambda: again.append(None))
    for _ in range(4):
        driver.add(b"x")
    served = 0
    for chain in queue.chains():
        now[0] += 0.03  # a disk's flush
        queue.push(chain, 0)
        served += 1
    assert (served, len(again)) == (2, 1)
    assert len(list(queue.chains())) == 2


def test_an_undone_pop_gives_the_same_again(memory: GuestMemory) -> None:
    driver = Driver(memory)
    queue = driver.queue()
    head = driver.add(7)
    first = queue.pop()
    queue.undo_pop()
    again = queue.pop()
    assert first is not None and again is not None
    assert first.head == again.head == head


def test_a_stopped_queue_touches_nothing(memory: GuestMemory) -> None:
    driver = Driver(memory)
    queue = driver.queue()
    driver.add(1)
    chain = queue.pop()
    driver.add(1)
    queue.stop()
    assert queue.pop() is None
    assert chain is not None
    queue.push(chain, 1)
    queue.notify()
    assert list(queue.chains()) == []
    assert (driver.used_idx(), driver.interrupts) == (0, 0)


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize(("reads", "writes"), [(16, 0), (0, 16), (1, 15), (15, 1), (4, 5), (9, 0), (0, 8)])
def test_long_chains(memory: GuestMemory, indirect: bool, reads: int, writes: int) -> None:
    """Up to as many buffers as the queue has descriptors, also behind an indirect one (2.7.5.3.1)."""
    driver = Driver(memory, size=16, indirect=indirect)
    queue = driver.queue()
    content = [bytes([number]) * (number + 1) for number in range(reads)]
    driver.add(*content, *range(1, writes + 1))
    (chain,) = serve(queue)
    assert [bytes(view) for view in chain.readable] == content
    assert [len(view) for view in chain.writable] == list(range(1, writes + 1))
    assert chain.readable_bytes == sum(map(len, content))
    assert chain.writable_bytes == writes * (writes + 1) // 2
    assert driver.result() == b"\xaa" * chain.writable_bytes


@pytest.mark.parametrize("indirect", [False, True])
def test_a_chain_is_no_longer_than_a_used_element_can_say(indirect: bool) -> None:
    """2.7.5.2: 2^32 bytes at most; the same piece of memory may be named again and again."""
    with guest_memory(1 << 30) as memory:
        driver = Driver(memory, size=16, indirect=indirect)
        queue = driver.queue()
        table = 0x20000 if indirect else driver.desc
        for number in range(16):
            flags = WRITE | (NEXT if number < 15 else 0)
            driver.descriptor(number, 0x40000, 1 << 28, flags, number + 1, 0x20000)
        if not indirect:
            memory.write(driver.desc, memory.read(0x20000, 16 * 16))
        else:
            driver.descriptor(0, table, 16 * 16, INDIRECT)
        driver.make_available(0)
        with pytest.raises(DriverError, match="makes a chain of 4294967296 bytes"):
            queue.pop()
        queue.stop()
        driver.dma.release()


def test_tables_of_every_length(memory: GuestMemory) -> None:
    driver = Driver(memory, size=512)
    queue = Queue(driver.dma, 512, driver.desc, driver.avail, driver.used, interrupt=lambda: None, indirect=True)
    for count in range(1, 513):
        for number in range(count):
            flags = NEXT if number < count - 1 else 0
            driver.descriptor(number, 0x40000 + 16 * number, number + 1, flags, number + 1, 0x20000)
        driver.descriptor(0, 0x20000, 16 * count, INDIRECT)
        driver.make_available(0)
        assert (chain := queue.pop()) is not None
        assert [len(view) for view in chain.readable] == list(range(1, count + 1))
    assert _table.cache_info().currsize <= 64, "a Struct of each length is memory that a driver fills"


@pytest.mark.parametrize("change", ["order", "shuffled", "flags", "outside"])
def test_long_chains_that_are_not_straight(memory: GuestMemory, change: str) -> None:
    driver = Driver(memory, size=16, indirect=True)
    queue = driver.queue()
    head = driver.add(*[b"x"] * 6, *[1] * 6)
    table = 0x20000 + head * 16 * 64
    match change:
        case "order":  # 2 follows on itself: a loop
            driver.descriptor(2, 0x40000, 1, NEXT, 2, table)
        case "shuffled":  # 0, 2, 1, 3: fine
            driver.descriptor(0, 0x40000, 1, NEXT, 2, table)
            driver.descriptor(2, 0x40000, 1, NEXT, 1, table)
            driver.descriptor(1, 0x40000, 1, NEXT, 3, table)
        case "flags":  # readable behind writable
            driver.descriptor(8, 0x40000, 1, NEXT, 9, table)
        case "outside":
            driver.descriptor(8, SIZE - 1, 2, NEXT | WRITE, 9, table)
    if change == "shuffled":
        (chain,) = serve(queue)
        assert (chain.readable_bytes, chain.writable_bytes) == (6, 6)
    else:
        with pytest.raises(DriverError):
            queue.pop()


# A hostile one: the set-up


@pytest.mark.parametrize("size", [0, 3, 6, 65535, 65536, 1 << 20])
def test_sizes_that_cannot_be(memory: GuestMemory, size: int) -> None:
    with pytest.raises(DriverError, match=f"size {size}"):
        Driver(memory, size).queue()


@pytest.mark.parametrize(("part", "off"), [("desc", 8), ("avail", 1), ("used", 2)])
def test_misaligned_rings(memory: GuestMemory, part: str, off: int) -> None:
    driver = Driver(memory)
    setattr(driver, part, getattr(driver, part) + off)
    with pytest.raises(DriverError, match="not aligned"):
        driver.queue()


@pytest.mark.parametrize("part", ["desc", "avail", "used"])
@pytest.mark.parametrize("address", [SIZE - 16, SIZE, 1 << 32, 0xFFFFFFFFFFFFFFF0])
def test_rings_outside_ram(memory: GuestMemory, part: str, address: int) -> None:
    driver = Driver(memory)
    setattr(driver, part, address)
    with pytest.raises(DriverError, match="not all in the guest's RAM"):
        driver.queue()


@pytest.mark.parametrize("part", ["desc", "avail", "used"])
def test_rings_in_pages_that_are_kept_from_the_guest(memory: GuestMemory, part: str) -> None:
    driver = Driver(memory, excluded=[PhysicalRange(0x30000, 0x31000)])
    for address in (0x30000, 0x30FF0, 0x2FFF0):
        setattr(driver, part, address)
        with pytest.raises(DriverError, match="not all in the guest's RAM"):
            driver.queue()


# A hostile one: chains


def loop(driver: Driver) -> None:
    driver.descriptor(0, 0x40000, 4, NEXT, 1)
    driver.descriptor(1, 0x40000, 4, NEXT, 0)


def itself(driver: Driver) -> None:
    driver.descriptor(0, 0x40000, 4, NEXT, 0)


def beyond_the_table(driver: Driver) -> None:
    driver.descriptor(0, 0x40000, 4, NEXT, 8)


def outside(driver: Driver) -> None:
    driver.descriptor(0, SIZE, 1, WRITE)


def over_the_end(driver: Driver) -> None:
    driver.descriptor(0, SIZE - 16, 17, WRITE)


def around_the_end_of_64_bits(driver: Driver) -> None:
    driver.descriptor(0, 0xFFFFFFFFFFFFFFF0, 0x20, WRITE)


def all_of_32_bits(driver: Driver) -> None:
    driver.descriptor(0, 0, 0xFFFFFFFF, WRITE)


def over_regions(driver: Driver) -> None:
    driver.descriptor(0, SIZE // 2 - 8, 16, WRITE)


def in_an_excluded_page(driver: Driver) -> None:
    driver.descriptor(0, 0x80010, 16, WRITE)


def into_an_excluded_page(driver: Driver) -> None:
    driver.descriptor(0, 0x7FFF0, 17, WRITE)


def over_an_excluded_page(driver: Driver) -> None:
    driver.descriptor(0, 0x7F000, 0x3000, WRITE)


def readable_behind_writable(driver: Driver) -> None:
    driver.descriptor(0, 0x40000, 4, NEXT | WRITE, 1)
    driver.descriptor(1, 0x40000, 4)


def table_in_a_table(driver: Driver) -> None:
    driver.descriptor(0, 0x20000, 32, INDIRECT)
    driver.descriptor(0, 0x20000, 32, INDIRECT, table=0x20000)


def empty_table(driver: Driver) -> None:
    driver.descriptor(0, 0x20000, 0, INDIRECT)


def half_a_descriptor(driver: Driver) -> None:
    driver.descriptor(0, 0x20000, 24, INDIRECT)


def table_outside(driver: Driver) -> None:
    driver.descriptor(0, SIZE - 16, 32, INDIRECT)


def table_with_more_behind_it(driver: Driver) -> None:
    driver.descriptor(0, 0x20000, 16, INDIRECT | NEXT, 1)
    driver.descriptor(0, 0x40000, 4, table=0x20000)


def beyond_an_indirect_table(driver: Driver) -> None:
    driver.descriptor(0, 0x20000, 16, INDIRECT)
    driver.descriptor(0, 0x40000, 4, NEXT, 1, table=0x20000)


def long_indirect_chain(driver: Driver) -> None:
    driver.descriptor(0, 0x20000, 16 * 9, INDIRECT)
    for number in range(9):  # one more than the queue has
        driver.descriptor(number, 0x40000, 4, NEXT if number < 8 else 0, number + 1, table=0x20000)


@pytest.mark.parametrize(
    "wrong",
    [
        loop,
        itself,
        beyond_the_table,
        outside,
        over_the_end,
        around_the_end_of_64_bits,
        all_of_32_bits,
        over_regions,
        in_an_excluded_page,
        into_an_excluded_page,
        over_an_excluded_page,
        readable_behind_writable,
        table_in_a_table,
        empty_table,
        half_a_descriptor,
        table_outside,
        table_with_more_behind_it,
        beyond_an_indirect_table,
        long_indirect_chain,
    ],
)
def test_chains_that_cannot_be(wrong: "object") -> None:
    assert callable(wrong)
    with guest_memory(SIZE, pieces=2) as memory:
        driver = Driver(memory, indirect=True, excluded=[PhysicalRange(0x80000, 0x81000)])
        if wrong is over_regions:
            pass  # the two pieces are neighbours for the guest, and not for us
        queue = driver.queue()
        wrong(driver)
        driver.make_available(0)
        with pytest.raises(DriverError):
            queue.pop()
        assert driver.used_idx() == 0


def test_neighbours_of_an_excluded_page_are_fine(memory: GuestMemory) -> None:
    driver = Driver(memory, excluded=[PhysicalRange(0x80000, 0x81000)])
    queue = driver.queue()
    driver.descriptor(0, 0x7F000, 0x1000, NEXT | WRITE, 1)
    driver.descriptor(1, 0x81000, 0x1000, WRITE)
    driver.make_available(0)
    (chain,) = serve(queue)
    assert chain.writable_bytes == 0x2000
    assert memory.read(0x80000, 16) == bytes(16)


def test_a_table_that_was_not_negotiated(memory: GuestMemory) -> None:
    driver = Driver(memory)
    queue = driver.queue()
    driver.descriptor(0, 0x20000, 16, INDIRECT)
    driver.make_available(0)
    with pytest.raises(DriverError, match="indirect"):
        queue.pop()


def test_a_head_beyond_the_table(memory: GuestMemory) -> None:
    driver = Driver(memory)
    queue = driver.queue()
    driver.make_available(8)
    with pytest.raises(DriverError, match="descriptor 8 of 8"):
        queue.pop()


@pytest.mark.parametrize("ahead", [9, 0x8000, 0xFFFF])
def test_an_index_that_jumps(memory: GuestMemory, ahead: int) -> None:
    driver = Driver(memory)
    queue = driver.queue()
    driver.make_available(0, ahead=ahead)
    with pytest.raises(DriverError, match="buffers available in a queue"):
        queue.pop()


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 1 << 32), st.booleans(), st.integers(1, 200))
def test_random_rings_raise_nothing_else(seed: int, event_idx: bool, changes: int) -> None:
    """Rings full of random bytes, changed between any two steps: a DriverError, or a chain that lies in RAM."""
    noise = random.Random(seed)
    with guest_memory(SIZE, pieces=2) as memory:
        driver = Driver(memory, event_idx=event_idx, indirect=True, excluded=[PhysicalRange(0x80000, 0x81000)])
        queue = driver.queue()
        for _ in range(changes):
            where = noise.choice((DESC, DESC, AVAIL, USED, 0x20000))
            value = noise.choice((0, 1, 2, 4, 5, 16, 32, 0x20000, 0x40000, 0x80000, SIZE, noise.getrandbits(64)))
            memory.write(where + 4 * noise.randrange(32), struct.pack("<I", value & 0xFFFFFFFF))
            if noise.random() < 0.5:
                try:
                    for chain in serve(queue):
                        for view in chain.readable:
                            view.tobytes()
                except DriverError:
                    queue.stop()
                    queue = driver.queue()
        assert memory.read(0x80000, 0x1000) == bytes(0x1000)
