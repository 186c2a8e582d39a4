"""Limits of a device: no more than they say, and whoever waits is woken."""

import os
from collections.abc import Callable

import pytest

from offmap.devices.virtio.drive import parse_drive
from offmap.devices.virtio.limit import Limit, Limiter
from offmap.devices.virtio.net_spec import parse_net
from offmap.devices.virtio.rng import Rng, RngSpec, parse_rng
from offmap.errors import OffmapError
from offmap.memory.guest import GuestMemory

from .driver import Driver, guest_memory
from .transport import Wired


class Time:
    """A clock that goes when it is told to, and what is to be done later."""

    def __init__(self) -> None:
        self.now = 100.0
        self.due: list[tuple[float, Callable[[], None]]] = []

    def later(self, seconds: float, function: Callable[[], None]) -> None:
        self.due.append((self.now + seconds, function))

    def go_on(self) -> None:
        when, function = self.due.pop(0)
        self.now = when
        function()


def limiter(limit: Limit) -> tuple[Limiter, Time, list[float]]:
    time = Time()
    woken: list[float] = []
    return Limiter(limit, time.later, lambda: woken.append(time.now), lambda: time.now), time, woken


def test_requests_are_counted() -> None:
    bucket, time, woken = limiter(Limit(ops=2))
    assert bucket.has_some()
    bucket.use(1, 1 << 40)
    assert bucket.has_some()
    bucket.use(1, 1 << 40)
    assert not bucket.has_some()
    assert not bucket.has_some()
    assert len(time.due) == 1, "it is woken once"
    time.go_on()
    assert woken == [100.5]
    assert bucket.has_some()


def test_a_request_may_be_larger_than_a_second_and_is_then_paid_for() -> None:
    bucket, time, woken = limiter(Limit(rate=1000))
    assert bucket.has_some()
    bucket.use(1, 5000)
    assert not bucket.has_some()
    time.go_on()
    assert 104 <= woken[0] < 104.01
    assert bucket.has_some()


def test_a_bucket_holds_no_more_than_a_second() -> None:
    bucket, time, _ = limiter(Limit(rate=1000))
    time.now += 3600
    assert bucket.has_some()
    bucket.use(1, 1000)
    assert not bucket.has_some()


def test_over_an_hour_it_is_the_rate() -> None:
    bucket, time, woken = limiter(Limit(rate=1 << 20, ops=100))
    served = 0
    while time.now < 3700:
        while bucket.has_some():
            bucket.use(1, 64 << 10)
            served += 1
        time.go_on()
    assert served == pytest.approx(16 * 3600, rel=0.01)
    assert len(woken) > 3600


@pytest.fixture
def memory() -> "GuestMemory":
    return guest_memory(1 << 20)


def test_a_device_stops_and_goes_on_by_itself(memory: GuestMemory) -> None:
    with memory:
        device = Rng(os.open("/dev/urandom", os.O_RDONLY))
        device.limit = Limit(ops=4)
        driver = Driver(memory, 16)
        with Wired(device, driver).set_up() as wired:
            for _ in range(6):
                driver.add(16)
            wired.kick()
            wired.await_interrupts(2)
            assert driver.used_idx() > 4


def test_options() -> None:
    assert parse_rng("") == RngSpec()
    assert parse_rng("rate=1M,ops=10") == RngSpec(Limit(1 << 20, 10))
    assert parse_drive("/x,rate=10M").limit == Limit(10 << 20)
    assert parse_drive("/x").limit is None
    assert parse_net("passt,ops=100").limit == Limit(None, 100)
    for wrong in ("rate=0", "ops=0", "rate=x", "ops=-1"):
        with pytest.raises(OffmapError):
            parse_rng(wrong)
    with pytest.raises(OffmapError, match="limit the tap"):
        parse_net("tap=t0,vhost=on,rate=1M")
