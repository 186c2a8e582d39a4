"""virtio-rng: entropy in the driver's buffers, however they are cut."""

import errno
import os
from collections.abc import Iterator

import pytest

from offmap.devices.virtio.rng import Rng, RngSpec, parse_rng
from offmap.memory.guest import GuestMemory
from offmap.uapi.virtio.config import VIRTIO_CONFIG_S_NEEDS_RESET

from .driver import Driver, guest_memory
from .transport import Wired


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with guest_memory(2 << 20) as memory:
        yield memory


@pytest.fixture
def wired(memory: GuestMemory) -> Iterator[Wired]:
    with Wired(Rng(os.open("/dev/urandom", os.O_RDONLY)), Driver(memory)).set_up() as wired:
        yield wired


@pytest.mark.parametrize("buffers", [(64,), (10, 54), (1, 1, 62)])
def test_it_fills_what_it_is_given(wired: Wired, buffers: tuple[int, ...]) -> None:
    driver = wired.drivers[0]
    answers = []
    for _ in range(2):
        driver.add(*buffers)
        wired.kick()
        answers.append(driver.result())
    assert [len(answer) for answer in answers] == [64, 64]
    assert answers[0] != answers[1]
    assert b"\xcc" * 8 not in answers[0]  # what was there before


@pytest.mark.parametrize("buffers", [(300_000,), (100, 300_000), (40_000, 40_000, 40_000)])
def test_a_large_request_is_answered_in_part(wired: Wired, buffers: tuple[int, ...]) -> None:
    wired.drivers[0].add(*buffers)
    wired.kick()
    assert 0 < len(wired.drivers[0].result()) <= 65536


def test_a_buffer_that_cannot_be_written_to(wired: Wired) -> None:
    wired.drivers[0].add(b"nothing to write to")
    wired.kick()
    assert wired.status & VIRTIO_CONFIG_S_NEEDS_RESET
    assert "has nothing to write to" in wired.said[0]


def test_memory_that_the_kernel_does_not_write_to(wired: Wired, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EFAULT, "")

    monkeypatch.setattr("os.readv", refuse)
    wired.drivers[0].add(40)
    wired.kick()
    assert len(wired.drivers[0].result()) == 40
    assert wired.said == []


def test_the_option_takes_nothing() -> None:
    assert isinstance(parse_rng(""), RngSpec)
