"""The 16550A: what the datasheet says, what Linux's 8250 driver does to it, and that it loses nothing."""

from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offmap.devices import serial as uart
from offmap.devices.serial import Serial16550A

RX = TX = 0
IER, IIR, LCR, MCR, LSR, MSR, SCR = 1, 2, 3, 4, 5, 6, 7
FCR = IIR
RTS_OUT2 = uart.UART_MCR_RTS | uart.UART_MCR_OUT2


class Line:
    """An interrupt line that checks that only changes are reported."""

    def __init__(self) -> None:
        self.level = False
        self.edges = 0

    def set(self, level: bool) -> None:
        assert level != self.level
        self.level = level
        self.edges += level


class Guest:
    """A UART with its surroundings, and the guest's end of it."""

    def __init__(self) -> None:
        self.line = Line()
        self.out: list[bytes] = []
        self.events: list[str] = []
        self.uart = Serial16550A(
            self.line,
            self.out.append,
            on_pending=lambda: self.events.append("pending"),
            on_open=lambda: self.events.append("open"),
            on_room=lambda: self.events.append("room"),
        )

    def inb(self, register: int) -> int:
        return self.uart.read(0x3F8 + register, 1)

    def outb(self, register: int, value: int) -> None:
        self.uart.write(0x3F8 + register, 1, value)

    def open(self) -> None:
        """As Linux's uart_startup leaves it: FIFO with trigger 8, receive interrupts, DTR, RTS and OUT2."""
        self.outb(FCR, 0x81)
        self.outb(IER, uart.UART_IER_RDI | uart.UART_IER_RLSI)
        self.outb(MCR, uart.UART_MCR_DTR | RTS_OUT2)

    def interrupt(self) -> bytes:
        """serial8250_interrupt: until IIR says no interrupt, receive while LSR says data (rx_chars: 256 at most)."""
        got = bytearray()
        for _ in range(512):  # PASS_LIMIT
            if self.inb(IIR) & 1:
                return bytes(got)
            status = self.inb(LSR)
            for _ in range(256):
                if not status & uart.UART_LSR_DR:
                    break
                got.append(self.inb(RX))
                status = self.inb(LSR)
        raise AssertionError("too much work for irq4")


@pytest.fixture
def guest() -> Guest:
    return Guest()


def test_linux_autoconfig_finds_a_16550a(guest: Guest) -> None:
    """The register sequence of autoconfig() and autoconfig_16550a() in drivers/tty/serial/8250/8250_port.c."""
    inb, outb = guest.inb, guest.outb
    ier = inb(IER)
    outb(IER, 0)
    assert inb(IER) & 0x0F == 0
    outb(IER, 0x0F)
    assert inb(IER) & 0x0F == 0x0F
    outb(IER, ier)

    mcr, lcr = inb(MCR), inb(LCR)
    outb(MCR, uart.UART_MCR_LOOP | 0x0A)
    assert inb(MSR) & 0xF0 == 0x90
    outb(MCR, mcr)

    outb(LCR, 0xBF)  # UART_LCR_CONF_MODE_B
    outb(2, 0)  # UART_EFR
    outb(LCR, 0)
    outb(FCR, uart.UART_FCR_ENABLE_FIFO)
    assert inb(IIR) >> 6 == 3, "16550A"

    outb(LCR, 0x80)
    assert inb(2) != 0, "no EFR under DLAB: not a 16650"
    outb(LCR, 0xBF)
    assert inb(2) != 0, "no EFR under 0xBF: not a 16650V2 or 16850"
    outb(LCR, 0)
    status1 = inb(MCR)
    outb(LCR, 0xE0)
    status2 = inb(2)
    if not (status2 ^ status1) & uart.UART_MCR_LOOP:  # National Semiconductor's EXCR1?
        outb(LCR, 0)
        outb(MCR, status1 ^ uart.UART_MCR_LOOP)
        outb(LCR, 0xE0)
        status2 = inb(2)
        outb(LCR, 0)
        outb(MCR, status1)
        assert not (status2 ^ status1) & uart.UART_MCR_LOOP, "not an NS16550A superset"
    outb(LCR, 0)
    outb(FCR, 0x01)
    short = inb(IIR) >> 5
    outb(FCR, 0x21)
    outb(LCR, 0x80)
    outb(FCR, 0x21)
    long = inb(IIR) >> 5
    outb(LCR, 0)
    assert (short, long) == (6, 6), "not a TI16750"
    outb(IER, inb(IER) & ~0x40)
    outb(IER, inb(IER) | 0x40)
    assert not inb(IER) & 0x40, "not an XScale"
    outb(LCR, lcr)
    assert not guest.line.edges
    assert guest.events == []


def test_linux_startup_finds_neither_bug_thre_nor_bug_txen(guest: Guest) -> None:
    """serial8250_do_startup: the THRE interrupt must come again when it is enabled again."""
    guest.outb(FCR, 0x01)
    guest.outb(FCR, 0x07)
    guest.outb(FCR, 0)
    for register in (LSR, RX, IIR, MSR):
        guest.inb(register)
    guest.outb(LCR, 0x03)
    guest.outb(IER, uart.UART_IER_THRI)
    first = guest.inb(IIR)
    guest.outb(IER, 0)
    guest.outb(IER, uart.UART_IER_THRI)
    second = guest.inb(IIR)
    guest.outb(IER, 0)
    assert not first & uart.UART_IIR_NO_INT
    assert not second & uart.UART_IIR_NO_INT
    guest.outb(IER, uart.UART_IER_THRI)
    assert guest.inb(LSR) & uart.UART_LSR_TEMT
    assert guest.inb(IIR) & 0x0F == uart.UART_IIR_THRI


def test_thre_latch(guest: Guest) -> None:
    guest.outb(MCR, uart.UART_MCR_OUT2)
    guest.outb(IER, uart.UART_IER_THRI)
    assert guest.line.level
    assert guest.inb(IIR) == uart.UART_IIR_THRI
    assert not guest.line.level, "reading IIR acknowledges it"
    assert guest.inb(IIR) == uart.UART_IIR_NO_INT
    guest.outb(IER, uart.UART_IER_THRI)
    assert guest.inb(IIR) == uart.UART_IIR_NO_INT, "writing it again without a change raises nothing"
    guest.outb(TX, ord("x"))
    assert guest.line.level
    guest.outb(IER, 0)
    assert not guest.line.level


def test_out2_gates_the_interrupt_and_loopback_disconnects_it(guest: Guest) -> None:
    guest.outb(IER, uart.UART_IER_THRI)
    assert not guest.line.level
    guest.outb(MCR, uart.UART_MCR_OUT2)
    assert guest.line.level
    guest.outb(MCR, uart.UART_MCR_OUT2 | uart.UART_MCR_LOOP)
    assert not guest.line.level
    assert guest.inb(IIR) == uart.UART_IIR_THRI


def test_priorities_of_interrupts(guest: Guest) -> None:
    guest.outb(FCR, 0x01)
    guest.outb(MCR, uart.UART_MCR_LOOP)
    for value in range(17):
        guest.outb(TX, value)
    guest.outb(IER, 0x0F)
    assert guest.inb(IIR) & 0x0F == uart.UART_IIR_RLSI
    assert guest.inb(LSR) & uart.UART_LSR_OE
    assert not guest.inb(LSR) & uart.UART_LSR_OE
    assert guest.inb(IIR) & 0x0F == uart.UART_IIR_RDI
    assert [guest.inb(RX) for _ in range(16)] == list(range(16)), "an overrun loses the newcomer"
    assert guest.inb(IIR) & 0x0F == uart.UART_IIR_THRI
    assert guest.inb(IIR) & 0x0F == uart.UART_IIR_MSI
    guest.inb(MSR)
    assert guest.inb(IIR) & 0x0F == uart.UART_IIR_NO_INT


def test_trigger_level_and_time_out(guest: Guest) -> None:
    guest.open()
    guest.uart.feed(b"1234567")
    assert guest.line.level
    assert guest.inb(IIR) == 0xC0 | uart.UART_IIR_RX_TIMEOUT
    guest.uart.feed(b"8")
    assert guest.inb(IIR) == 0xC0 | uart.UART_IIR_RDI
    assert guest.interrupt() == b"12345678"
    assert not guest.line.level


def test_modem_lines_and_their_deltas(guest: Guest) -> None:
    assert guest.inb(MSR) == 0xB0
    guest.outb(MCR, uart.UART_MCR_LOOP)
    assert guest.inb(MSR) == 0x0B
    assert guest.inb(MSR) == 0x00
    guest.outb(MCR, uart.UART_MCR_LOOP | uart.UART_MCR_OUT1)
    assert guest.inb(MSR) == uart.UART_MSR_RI, "RI's start is no event"
    guest.outb(MCR, uart.UART_MCR_LOOP)
    assert guest.inb(MSR) == uart.UART_MSR_TERI


def test_divisor_latch_and_scratch(guest: Guest) -> None:
    guest.outb(LCR, 0x83)
    guest.outb(0, 0x34)
    guest.outb(1, 0x12)
    assert (guest.inb(0), guest.inb(1), guest.inb(LCR)) == (0x34, 0x12, 0x83)
    guest.outb(LCR, 0x03)
    guest.outb(SCR, 0xA5)
    assert (guest.inb(IER), guest.inb(SCR)) == (0, 0xA5)
    assert guest.out == []


def test_output_goes_by_line_by_256_or_by_flush(guest: Guest) -> None:
    for byte in b"one\r\ntwo":
        guest.outb(TX, byte)
    assert guest.out == [b"one\r\n"]
    assert guest.events == ["pending", "pending"]
    guest.uart.flush()
    guest.uart.flush()
    assert guest.out == [b"one\r\n", b"two"]
    for _ in range(300):
        guest.outb(TX, ord("."))
    assert guest.out[2:] == [b"." * 256]
    guest.outb(MCR, uart.UART_MCR_LOOP)
    guest.outb(TX, ord("!"))
    guest.uart.flush()
    assert guest.out[3:] == [b"." * 44]


def test_input_waits_until_the_guest_is_ready_to_receive(guest: Guest) -> None:
    assert guest.uart.feed(b"typed ahead") == 11
    assert not guest.inb(LSR) & uart.UART_LSR_DR
    guest.outb(FCR, 0x07)
    guest.inb(RX)
    guest.open()
    assert guest.interrupt() == b"typed ahead"


def test_rts_off_holds_the_rest_back(guest: Guest) -> None:
    guest.open()
    guest.uart.feed(bytes(range(40)))
    guest.outb(MCR, uart.UART_MCR_DTR | uart.UART_MCR_OUT2)
    assert guest.interrupt() == bytes(range(16))
    guest.outb(MCR, uart.UART_MCR_DTR | RTS_OUT2)
    got = guest.interrupt() + guest.interrupt()
    assert got == bytes(range(16, 40))


def test_an_interrupt_is_over_between_two_fillings_of_the_fifo(guest: Guest) -> None:
    """A long paste must not be read in a single interrupt."""
    guest.open()
    guest.uart.feed(bytes(64))
    received, passes = 0, 0
    while guest.line.level:
        assert guest.inb(IIR) & 1 == 0
        while guest.inb(LSR) & uart.UART_LSR_DR:
            guest.inb(RX)
            received += 1
        assert guest.inb(IIR) & 1 == 1
        passes += 1
    assert (received, passes, guest.line.edges) == (64, 4, 4)


def test_a_polling_guest_gets_everything_too(guest: Guest) -> None:
    guest.open()
    guest.uart.feed(bytes(range(100)))
    got = bytearray()
    polls = 0
    while len(got) < 100 and polls < 1000:
        polls += 1
        if guest.inb(LSR) & uart.UART_LSR_DR:
            got.append(guest.inb(RX))
    assert bytes(got) == bytes(range(100))


def test_without_fifo_it_is_one_byte_deep(guest: Guest) -> None:
    guest.outb(IER, uart.UART_IER_RDI)
    guest.outb(MCR, RTS_OUT2)
    guest.uart.feed(b"abc")
    assert guest.inb(IIR) == uart.UART_IIR_RDI
    got = bytearray()
    while guest.line.level:
        got += guest.interrupt()
    assert bytes(got) == b"abc"


def test_open_is_told_once_and_not_by_the_probe(guest: Guest) -> None:
    guest.outb(MCR, RTS_OUT2 | uart.UART_MCR_LOOP)
    guest.outb(IER, 0x0F)
    guest.outb(IER, 0)
    guest.outb(MCR, 0)
    assert guest.events == []
    guest.open()
    guest.outb(IER, 0)
    guest.open()
    assert guest.events == ["open"]


def test_64_kib_arrive_whole_and_in_order(guest: Guest) -> None:
    text = bytes(i * 7 & 0xFF for i in range(65536))
    guest.open()
    sent, got = 0, bytearray()
    while len(got) < len(text):
        if sent < len(text):
            taken = guest.uart.feed(text[sent : sent + 5000])
            sent += taken
        guest.events.clear()
        while guest.line.level and not (sent < len(text) and "room" in guest.events):
            got += guest.interrupt()
    assert bytes(got) == text


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("feed"), st.integers(1, 6000)),
        st.tuples(st.just("interrupt"), st.just(0)),
        st.tuples(st.just("read"), st.integers(1, 40)),
        st.tuples(st.just("rts"), st.booleans().map(int)),
        st.tuples(st.just("rdi"), st.booleans().map(int)),
        st.tuples(st.just("status"), st.integers(0, 7)),
    ),
    max_size=60,
)


@given(STEPS)
def test_nothing_is_lost_or_reordered_whatever_the_order(steps: list[tuple[str, int]]) -> None:
    guest = Guest()
    guest.open()
    sent, got = 0, bytearray()

    def numbered(start: int, count: int) -> bytes:
        return bytes(i * 31 + (i >> 8) & 0xFF for i in range(start, start + count))

    for what, argument in steps:
        match what:
            case "feed":
                sent += guest.uart.feed(numbered(sent, argument))
            case "interrupt" if guest.line.level:
                got += guest.interrupt()
            case "read":
                for _ in range(argument):
                    if guest.inb(LSR) & uart.UART_LSR_DR:
                        got.append(guest.inb(RX))
            case "rts":
                guest.outb(MCR, uart.UART_MCR_OUT2 | (uart.UART_MCR_RTS if argument else 0))
            case "rdi":
                guest.outb(IER, argument)
            case "status" if argument != RX:
                guest.inb(argument)
    guest.open()
    for _ in range(2 * 65536):
        if len(got) == sent:
            break
        if guest.line.level:
            got += guest.interrupt()
        elif guest.inb(LSR) & uart.UART_LSR_DR:
            got.append(guest.inb(RX))
    assert bytes(got) == numbered(0, sent)
    assert not guest.inb(LSR) & (uart.UART_LSR_DR | uart.UART_LSR_OE)


def test_output_of_two_flushing_threads_keeps_its_order() -> None:
    guest = Guest()
    done = False

    def flusher() -> None:
        while not done:
            guest.uart.flush()

    thread = Thread(target=flusher)
    thread.start()
    expected = bytes(i & 0x7F for i in range(20000))
    for byte in expected:
        guest.outb(TX, byte)
    done = True
    thread.join()
    guest.uart.flush()
    assert b"".join(guest.out) == expected
