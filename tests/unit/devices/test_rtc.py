"""The CMOS clock: what the registers say of the time, how it is set, and its interrupts."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offmap.devices.rtc import Rtc, _seconds

SET, PIE, AIE, UIE, BINARY, H24 = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
IRQF, PF, AF, UF = 0x80, 0x40, 0x20, 0x10
CENTURY = 0x32
TIMES = st.datetimes(datetime(1970, 1, 2), datetime(2199, 12, 31)).map(lambda t: t.replace(microsecond=0, tzinfo=UTC))


class Line:
    """An interrupt line that checks that only changes are reported."""

    def __init__(self) -> None:
        self.level = False

    def set(self, level: bool) -> None:
        assert level != self.level
        self.level = level


class Guest:
    """A clock whose host time the test moves."""

    def __init__(self, now: datetime = datetime(2026, 11, 22, 19, 36, 1, tzinfo=UTC)) -> None:
        self.now = now.timestamp()
        self.line = Line()
        self.deadlines = 0
        self.rtc = Rtc(self.line, clock=lambda: self.now, on_deadline=self._deadline)

    def _deadline(self) -> None:
        self.deadlines += 1

    def __getitem__(self, register: int) -> int:
        self.rtc.write(0x70, 1, register)
        return self.rtc.read(0x71, 1)

    def __setitem__(self, register: int, value: int) -> None:
        self.rtc.write(0x70, 1, register)
        self.rtc.write(0x71, 1, value)

    def moment(self) -> datetime:
        """As mc146818_get_time decodes it."""

        def number(value: int) -> int:
            return value if self[0x0B] & BINARY else (value >> 4) * 10 + (value & 15)

        hour = self[4]
        half = 12 if hour & 0x80 else 0
        hours = number(hour) if self[0x0B] & H24 else number(hour & 0x7F) % 12 + half
        year = number(self[CENTURY]) * 100 + number(self[9])
        return datetime(year, number(self[8]), number(self[7]), hours, number(self[2]), number(self[0]), tzinfo=UTC)

    def set_moment(self, moment: datetime) -> None:
        """As mc146818_set_time encodes it, with SET held."""
        control = self[0x0B]

        def code(value: int) -> int:
            return value if control & BINARY else value // 10 << 4 | value % 10

        hour = code(moment.hour) if control & H24 else code(moment.hour % 12 or 12) | (moment.hour >= 12) << 7
        self[0x0B] = control | SET
        for register, value in (
            (9, code(moment.year % 100)),
            (8, code(moment.month)),
            (7, code(moment.day)),
            (4, hour),
            (2, code(moment.minute)),
            (0, code(moment.second)),
            (CENTURY, code(moment.year // 100)),
        ):
            self[register] = value
        self[0x0B] = control


def test_a_pc_s_clock_is_bcd_and_24_hours() -> None:
    guest = Guest(datetime(2026, 11, 22, 19, 36, 1, tzinfo=UTC))
    assert [guest[r] for r in (0, 2, 4, 6, 7, 8, 9, CENTURY)] == [1, 0x36, 0x19, 1, 0x22, 0x11, 0x26, 0x20]
    assert guest[0x0A] == 0x26, "no update in progress"
    assert guest[0x0B] == H24
    assert guest[0x0D] == 0x80, "the battery is good"


@given(TIMES, st.sampled_from([0, BINARY, H24, BINARY | H24]))
def test_every_time_reads_back_in_every_format(moment: datetime, formats: int) -> None:
    guest = Guest(moment)
    guest[0x0B] = formats
    assert guest.moment() == moment


@given(TIMES, TIMES, st.sampled_from([0, BINARY, H24, BINARY | H24]), st.integers(0, 10**6))
def test_a_clock_that_was_set_runs_on_from_there(host: datetime, to: datetime, formats: int, later: int) -> None:
    guest = Guest(host)
    guest[0x0B] = formats
    guest.set_moment(to)
    assert guest.moment() == to
    guest.now += later
    assert guest.moment().timestamp() == to.timestamp() + later


def test_the_time_stands_still_while_set_is_held() -> None:
    guest = Guest()
    guest[0x0B] = SET | H24
    guest.now += 30
    assert guest[0] == 1
    guest[0x0B] = H24
    assert guest[0] == 1


def test_a_single_register_can_be_written_without_set() -> None:
    guest = Guest()
    guest[2] = 0x59
    assert (guest[4], guest[2], guest[0]) == (0x19, 0x59, 0x01)


def test_what_is_no_date_leaves_the_clock_alone() -> None:
    guest = Guest()
    guest[0x0B] = SET | H24
    guest[8] = 0x13
    guest[0x0B] = H24
    assert guest.moment() == datetime(2026, 11, 22, 19, 36, 1, tzinfo=UTC)


def test_cmos_ram_keeps_what_is_written_and_the_nmi_bit_is_no_address() -> None:
    guest = Guest()
    guest[0x0F] = 0x0A  # the shutdown code, which Linux writes for every CPU it starts
    guest.rtc.write(0x70, 1, 0x8F)
    assert guest.rtc.read(0x71, 1) == 0x0A
    assert guest.rtc.read(0x70, 1) == 0xFF
    guest[0x0D] = 0
    assert guest[0x0D] == 0x80


def test_reading_the_time_takes_no_interrupt_and_no_deadline() -> None:
    guest = Guest()
    guest.moment()
    assert guest.rtc.next_event() is None
    assert (guest.deadlines, guest.line.level) == (0, False)


def test_update_interrupt_once_a_second() -> None:
    guest = Guest()
    guest[0x0B] = H24 | UIE
    assert guest.deadlines == 1
    assert guest.rtc.next_event() == guest.now + 1
    guest.rtc.tick()
    assert not guest.line.level
    guest.now += 1
    guest.rtc.tick()
    assert guest.line.level
    assert guest.rtc.next_event() is None, "nothing more until it is acknowledged"
    assert guest[0x0C] & (IRQF | UF) == IRQF | UF
    assert not guest.line.level
    assert guest.deadlines == 2
    assert guest.rtc.next_event() == guest.now + 1


def test_alarm_at_its_time_and_not_before() -> None:
    guest = Guest(datetime(2026, 11, 22, 23, 59, 50, tzinfo=UTC))
    guest[1], guest[3], guest[5] = 0x05, 0x00, 0x00
    guest[0x0B] = H24 | AIE
    assert guest.rtc.next_event() == guest.now + 15
    guest.now += 14
    guest.rtc.tick()
    assert not guest.line.level
    guest.now += 5
    guest.rtc.tick()
    assert guest.line.level
    assert guest[0x0C] & (IRQF | AF) == IRQF | AF
    assert guest.rtc.next_event() == guest.now - 4 + 86400


@pytest.mark.parametrize(
    ("alarm", "wait"),
    [((0xFF, 0xFF, 0xFF), 1), ((0x30, 0xFF, 0xFF), 29), ((0x00, 0x36, 0xC0), 3599), ((0x01, 0x36, 0x19), 86400)],
)
def test_alarm_registers_that_match_every_value(alarm: tuple[int, int, int], wait: int) -> None:
    guest = Guest(datetime(2026, 11, 22, 19, 36, 1, tzinfo=UTC))
    guest[1], guest[3], guest[5] = alarm
    guest[0x0B] = H24 | AIE
    assert guest.rtc.next_event() == guest.now + wait


def test_an_impossible_alarm_never_comes() -> None:
    guest = Guest()
    guest[1] = 0x75
    guest[0x0B] = H24 | AIE
    assert guest.rtc.next_event() is None


def test_alarm_follows_the_guest_s_time_not_the_host_s() -> None:
    guest = Guest(datetime(2026, 11, 22, 12, 0, 0, tzinfo=UTC))
    guest.set_moment(datetime(2000, 1, 1, 6, 0, 0, tzinfo=UTC))
    guest[1], guest[3], guest[5] = 0x00, 0x01, 0x06
    guest[0x0B] = H24 | AIE
    assert guest.rtc.next_event() == guest.now + 60


def test_periodic_interrupts_are_merged_until_acknowledged() -> None:
    guest = Guest()
    guest[0x0B] = H24 | PIE
    assert guest.rtc.next_event() == pytest.approx(guest.now + 1 / 1024)
    guest.now += 5
    guest.rtc.tick()
    assert guest.line.level
    assert guest[0x0C] & (IRQF | PF) == IRQF | PF
    guest[0x0A] = 0x20
    assert guest.rtc.next_event() is None, "rate 0 is no interrupt"


def test_a_host_clock_that_goes_back_raises_nothing() -> None:
    guest = Guest()
    guest[0x0B] = H24 | UIE
    guest.now -= 100
    guest.rtc.tick()
    assert not guest.line.level
    assert guest.rtc.next_event() == guest.now + 1


@pytest.mark.parametrize(("year", "step"), [(9999, 3600.0), (1, -3600.0)])
def test_a_guest_at_the_end_of_time(year: int, step: float) -> None:
    guest = Guest()
    guest[0x0B] = SET | H24 | BINARY | AIE | PIE
    last = {0: 59, 2: 59, 4: 23, 7: 31, 8: 12} if year > 1 else {0: 0, 2: 0, 4: 0, 7: 1, 8: 1}
    for register, value in {**last, 9: year % 100, CENTURY: year // 100}.items():
        guest[register] = value
    guest[0x0B] = H24 | BINARY | AIE | PIE
    assert guest.moment().year == year
    guest.now += step  # the host's clock may be set back, too
    guest.rtc.tick()
    assert guest.moment().year == year
    guest[0] = 0


@given(
    st.lists(
        st.tuples(
            st.sampled_from([*range(14), CENTURY]), st.integers(0, 255), st.sampled_from([0.0, 0.5, 1.0, 86400.0, -5.0])
        ),
        max_size=60,
    )
)
def test_nothing_a_guest_writes_upsets_it(writes: list[tuple[int, int, float]]) -> None:
    guest = Guest()
    for register, value, step in writes:
        guest[register] = value
        guest.now += step
        guest.rtc.tick()
        guest.rtc.next_event()
        assert all(0 <= guest[other] <= 0xFF for other in (0, 4, 9, CENTURY))


@given(st.tuples(st.integers(0, 10000), *(st.integers(0, most) for most in (14, 33, 25, 61, 61))))
def test_dates_that_there_are_and_dates_that_there_are_not(parts: tuple[int, int, int, int, int, int]) -> None:
    year, month, day, hour, minute, second = parts
    try:
        expected = datetime(year, month, day, hour, minute, second, tzinfo=UTC)
    except ValueError:
        assert _seconds(*parts) is None
    else:
        seconds = _seconds(*parts)
        assert seconds is not None
        assert datetime.fromtimestamp(0, UTC) + timedelta(seconds=seconds) == expected
