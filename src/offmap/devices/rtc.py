"""The MC146818 real-time clock of a PC, with its CMOS RAM: the guest's idea of the date.

It follows the host's clock (UTC). A guest that sets it gets an offset of its own. Registers are computed when read, so
"update in progress" is never set and no reader waits. ``tick`` raises alarm, periodic and update interrupts; the event
loop calls it at ``next_event``. Source: Motorola MC146818A datasheet. ACPI's FADT names register 0x32 (century).
"""

import math
import time
from collections.abc import Callable, Sequence
from itertools import product
from threading import Lock

from offmap.devices.bus import IrqLine
from offmap.uapi.pc import RTC_PORT

# Names from include/linux/mc146818rtc.h.
RTC_SECONDS, RTC_SECONDS_ALARM, RTC_MINUTES, RTC_MINUTES_ALARM, RTC_HOURS, RTC_HOURS_ALARM = range(6)
RTC_DAY_OF_WEEK, RTC_DAY_OF_MONTH, RTC_MONTH, RTC_YEAR = range(6, 10)
RTC_REG_A, RTC_REG_B, RTC_REG_C, RTC_REG_D = range(10, 14)
CENTURY = 0x32

RTC_UIP = 0x80
RTC_SET, RTC_PIE, RTC_AIE, RTC_UIE, RTC_DM_BINARY, RTC_24H = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
RTC_IRQF, RTC_PF, RTC_AF, RTC_UF = 0x80, 0x40, 0x20, 0x10
RTC_VRT = 0x80
PM = 0x80  # in the hours register, 12-hour mode
REF_CLCK_32KHZ_1024HZ = 0x26
BASE_HZ = 32768
DONT_CARE = 0xC0  # an alarm register with both top bits set matches every value
CMOS_SIZE = 128
NMI_DISABLE = 0x80  # bit 7 of the index port is not part of the index

TIME_REGISTERS = (RTC_SECONDS, RTC_MINUTES, RTC_HOURS, *range(RTC_DAY_OF_WEEK, RTC_YEAR + 1), CENTURY)
ALARM_REGISTERS = (RTC_SECONDS_ALARM, RTC_MINUTES_ALARM, RTC_HOURS_ALARM)
FIRST, LAST = -62135596800, 253402300799  # seconds since 1970: the beginning of year 1, the end of 9999


class Rtc:
    """The clock at ports 0x70 and 0x71. Port I/O comes from vCPU threads, ``tick`` from the main thread.

    Args:
        irq: its interrupt line (8 on a PC).
        clock: seconds since 1970 UTC.
        on_deadline: ``next_event`` may have changed. Called on a vCPU thread.
    """

    byte_wide = True

    def __init__(
        self, irq: IrqLine, *, clock: Callable[[], float] = time.time, on_deadline: Callable[[], None] = lambda: None
    ) -> None:
        self._irq = irq
        self._clock = clock
        self._on_deadline = on_deadline
        self._lock = Lock()
        self._index = 0
        self._offset = 0.0  # guest time minus host time
        self._level = False
        self._ram = bytearray(CMOS_SIZE)
        self._ram[RTC_REG_A] = REF_CLCK_32KHZ_1024HZ
        self._ram[RTC_REG_B] = RTC_24H
        self._checked = clock()  # guest time up to which alarms and ticks have been seen

    def ports(self) -> Sequence[range]:
        """Index and data."""
        return (range(RTC_PORT, RTC_PORT + 2),)

    def read(self, port: int, size: int) -> int:
        """The selected register; the index itself is write-only."""
        if port == RTC_PORT:
            return 0xFF
        with self._lock:
            index = self._index
            value = self._read(index)
            rearmed = index == RTC_REG_C and self._next_event() is not None
        if rearmed:
            self._on_deadline()
        return value

    def write(self, port: int, size: int, value: int) -> None:
        """Select a register, or write the selected one."""
        if port == RTC_PORT:
            self._index = value & ~NMI_DISABLE & 0xFF
            return
        with self._lock:
            before = self._next_event()
            self._write(self._index, value)
            moved = self._next_event() != before
        if moved:
            self._on_deadline()

    def next_event(self) -> float | None:
        """When ``tick`` should be called next, by ``clock``; None while no interrupt is enabled."""
        with self._lock:
            return self._next_event()

    def tick(self) -> None:
        """Raise the interrupts that have become due. Calling it at any other time is harmless."""
        with self._lock:
            self._note_events()

    # ---- time

    def _now(self) -> float:
        return self._clock() + self._offset

    def _encode(self, register: int, moment: time.struct_time) -> int:
        match register:
            case 0:  # RTC_SECONDS
                number = moment.tm_sec
            case 2:  # RTC_MINUTES
                number = moment.tm_min
            case 4:  # RTC_HOURS
                if self._ram[RTC_REG_B] & RTC_24H:
                    number = moment.tm_hour
                else:
                    number = moment.tm_hour % 12 or 12
                    return self._to_format(number) | (PM if moment.tm_hour >= 12 else 0)
            case 6:  # RTC_DAY_OF_WEEK, Sunday is 1
                number = (moment.tm_wday + 1) % 7 + 1
            case 7:  # RTC_DAY_OF_MONTH
                number = moment.tm_mday
            case 8:  # RTC_MONTH
                number = moment.tm_mon
            case 9:  # RTC_YEAR
                number = moment.tm_year % 100
            case _:  # CENTURY
                number = moment.tm_year // 100
        return self._to_format(number)

    def _to_format(self, number: int) -> int:
        return number if self._ram[RTC_REG_B] & RTC_DM_BINARY else number // 10 << 4 | number % 10

    def _from_format(self, value: int) -> int:
        return value if self._ram[RTC_REG_B] & RTC_DM_BINARY else (value >> 4) * 10 + (value & 0xF)

    def _hour_from_format(self, value: int) -> int:
        if self._ram[RTC_REG_B] & RTC_24H:
            return self._from_format(value)
        return self._from_format(value & ~PM) % 12 + (12 if value & PM else 0)

    def _latch(self) -> None:
        """Put the time into the registers, where a guest that has set RTC_SET edits it."""
        moment = _moment(self._now())
        for register in TIME_REGISTERS:
            self._ram[register] = self._encode(register, moment)

    def _unlatch(self) -> None:
        """Take the time from the registers. If they hold no date, the clock stays as it was."""
        ram = self._ram
        seconds = _seconds(
            self._from_format(ram[CENTURY]) * 100 + self._from_format(ram[RTC_YEAR]),
            self._from_format(ram[RTC_MONTH]),
            self._from_format(ram[RTC_DAY_OF_MONTH]),
            self._hour_from_format(ram[RTC_HOURS]),
            self._from_format(ram[RTC_MINUTES]),
            self._from_format(ram[RTC_SECONDS]),
        )
        if seconds is None:
            return
        self._offset = seconds - self._clock()
        self._checked = self._now()

    # ---- registers

    def _read(self, register: int) -> int:
        if register in TIME_REGISTERS and not self._ram[RTC_REG_B] & RTC_SET:
            return self._encode(register, _moment(self._now()))
        if register == RTC_REG_C:
            self._note_events()
            flags = self._ram[RTC_REG_C]
            self._ram[RTC_REG_C] = 0  # reading it is the acknowledgement
            self._update_irq()
            return flags
        if register == RTC_REG_D:
            return RTC_VRT
        return self._ram[register]

    def _write(self, register: int, value: int) -> None:
        was_set = self._ram[RTC_REG_B] & RTC_SET
        if register in (RTC_REG_C, RTC_REG_D):
            return
        if register == RTC_REG_A:
            self._note_events()
            self._ram[register] = value & ~RTC_UIP
        elif register == RTC_REG_B:
            self._note_events()
            if value & RTC_SET:
                value &= ~RTC_UIE  # the datasheet: SET clears UIE
                if not was_set:
                    self._latch()
            self._ram[register] = value
            if was_set and not value & RTC_SET:
                self._unlatch()
            self._update_irq()
        elif register in TIME_REGISTERS and not was_set:
            self._latch()
            self._ram[register] = value
            self._unlatch()
        else:
            self._ram[register] = value

    # ---- interrupts

    def _period(self) -> float:
        """Seconds between periodic interrupts; 0 for none. Rates 1 and 2 repeat 8 and 9 with a 32 kHz clock."""
        rate = self._ram[RTC_REG_A] & 0x0F
        if rate == 0:
            return 0.0
        return (1 << (rate + 7 if rate <= 2 else rate) - 1) / BASE_HZ

    def _next_alarm(self, after: float) -> float | None:
        """The first whole second later than ``after`` that matches the alarm registers; they repeat every day."""
        wanted: list[range] = []
        for register, count in zip(ALARM_REGISTERS, (60, 60, 24), strict=True):
            value = self._ram[register]
            if value & DONT_CARE == DONT_CARE:
                wanted.append(range(count))
                continue
            number = self._hour_from_format(value) if count == 24 else self._from_format(value)
            if number >= count:
                return None  # never matches
            wanted.append(range(number, number + 1))
        seconds, minutes, hours = wanted
        first = math.floor(after) + 1
        midnight = first - first % 86400
        for day, hour, minute in product((midnight, midnight + 86400), hours, minutes):
            start = day + hour * 3600 + minute * 60
            second = max(first - start, seconds[0])
            if second <= seconds[-1]:
                return float(start + second)
        return None

    def _next_event(self) -> float | None:
        control = self._ram[RTC_REG_B]
        flags = self._ram[RTC_REG_C]
        due: list[float] = []
        if control & RTC_PIE and not flags & RTC_PF and (period := self._period()):
            due.append((math.floor(self._checked / period) + 1) * period)
        if not control & RTC_SET:
            if control & RTC_UIE and not flags & RTC_UF:
                due.append(math.floor(self._checked) + 1.0)
            if control & RTC_AIE and not flags & RTC_AF:
                alarm = self._next_alarm(self._checked)
                if alarm is not None:
                    due.append(alarm)
        return min(due) - self._offset if due else None

    def _note_events(self) -> None:
        """Set the flags of all events since the last call, whether or not they may interrupt."""
        since, now = self._checked, self._now()
        self._checked = now
        if now <= since:
            return
        period = self._period()
        if period and math.floor(now / period) > math.floor(since / period):
            self._ram[RTC_REG_C] |= RTC_PF
        if not self._ram[RTC_REG_B] & RTC_SET and math.floor(now) > math.floor(since):
            self._ram[RTC_REG_C] |= RTC_UF
            alarm = self._next_alarm(since)
            if alarm is not None and alarm <= now:
                self._ram[RTC_REG_C] |= RTC_AF
        self._update_irq()

    def _update_irq(self) -> None:
        level = bool(self._ram[RTC_REG_B] & self._ram[RTC_REG_C] & (RTC_PF | RTC_AF | RTC_UF))
        self._ram[RTC_REG_C] = self._ram[RTC_REG_C] & ~RTC_IRQF & 0xFF | (RTC_IRQF if level else 0)
        if level != self._level:
            self._level = level
            self._irq.set(level)


def _moment(seconds: float) -> time.struct_time:
    """The date, limited to the years 1 to 9999: a guest may set its clock to the last second of 9999."""
    return time.gmtime(math.floor(min(max(seconds, FIRST), LAST)))


def _seconds(year: int, month: int, day: int, hour: int, minute: int, second: int) -> int | None:
    """Seconds since 1970 of a date and time in UTC; None if there is no such date in the years 1 to 9999.

    The datetime module is not for this place: to import it would open files, which the VMM's sandbox forbids.
    """
    if not (1 <= year <= 9999 and 1 <= month <= 12 and day >= 1 and hour < 24 and minute < 60 and second < 60):
        return None
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    months = (31, 29 if leap else 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
    if day > months[month - 1]:
        return None
    before = year - 1
    days = 365 * before + before // 4 - before // 100 + before // 400 + sum(months[: month - 1]) + day - 1
    return FIRST + 86400 * days + 3600 * hour + 60 * minute + second
