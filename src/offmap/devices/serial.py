"""A 16550A UART: the guest's console.

Registers behave as in the National Semiconductor PC16550D datasheet. The UART is wired as on a PC: OUT2 gates the
interrupt, and the far end's modem lines (CTS, DSR, DCD) are up. The line is infinitely fast and loses nothing:

- Output: the transmitter is always empty. Bytes are handed on by line, by 256, or when ``flush`` is called.
- Input: bytes wait on the host's side. They enter the 16-byte FIFO when it has room and the guest holds RTS, so it
  cannot overrun. Linux raises RTS when a process opens the port, after it has emptied the FIFOs. It lowers RTS when
  the last process closes the port (under CRTSCTS also when its own buffers fill up). So what is typed while the guest
  boots, or between two logins, is kept and not flushed.

Linux drains the FIFO with interrupts off until it is empty. A long paste must not keep it there. So while the receive
interrupt is enabled, the FIFO is refilled when the guest has read "no interrupt" from IIR. A driver on the
edge-triggered ISA bus must read that before its handler returns.
"""

from collections import deque
from collections.abc import Callable, Sequence
from threading import Lock

from offmap.devices.bus import IrqLine
from offmap.uapi.pc import COM1_PORT, UART_PORTS

# Register offsets and bits, by their names in include/uapi/linux/serial_reg.h.
UART_RX = UART_TX = UART_DLL = 0
UART_IER = UART_DLM = 1
UART_IIR = UART_FCR = 2
UART_LCR, UART_MCR, UART_LSR, UART_MSR, UART_SCR = 3, 4, 5, 6, 7

UART_IER_RDI, UART_IER_THRI, UART_IER_RLSI, UART_IER_MSI = 0x01, 0x02, 0x04, 0x08
UART_IIR_NO_INT = 0x01
UART_IIR_MSI, UART_IIR_THRI, UART_IIR_RDI, UART_IIR_RLSI, UART_IIR_RX_TIMEOUT = 0x00, 0x02, 0x04, 0x06, 0x0C
UART_IIR_FIFO_ENABLED = 0xC0
UART_FCR_ENABLE_FIFO, UART_FCR_CLEAR_RCVR = 0x01, 0x02
UART_LCR_DLAB = 0x80
UART_MCR_DTR, UART_MCR_RTS, UART_MCR_OUT1, UART_MCR_OUT2, UART_MCR_LOOP = 0x01, 0x02, 0x04, 0x08, 0x10
UART_LSR_DR, UART_LSR_OE, UART_LSR_THRE, UART_LSR_TEMT = 0x01, 0x02, 0x20, 0x40
UART_MSR_CTS, UART_MSR_DSR, UART_MSR_RI, UART_MSR_DCD = 0x10, 0x20, 0x40, 0x80
UART_MSR_TERI = 0x04

FIFO_SIZE = 16
TRIGGER_LEVELS = (1, 4, 8, 14)  # FCR bits 7:6
FLUSH_AT = 256  # bytes of output without a newline
NEWLINE = 0x0A
INPUT_QUEUE = 4096  # bytes that may wait on the host's side; N_TTY_BUF_SIZE, what a Linux terminal itself buffers
FAR_END_UP = UART_MSR_CTS | UART_MSR_DSR | UART_MSR_DCD
DLL_9600 = 12  # 115200 / 9600


class Serial16550A:
    """One UART. Port I/O comes from vCPU threads, ``feed`` and ``flush`` from the main thread.

    Args:
        irq: its interrupt line.
        output: takes what the guest sent, in order, one call at a time. If it blocks, only the guest waits.
        base: its first port.
        on_pending: called on a vCPU thread when output waits: call ``flush`` soon.
        on_open: called once, on a vCPU thread, when the guest first opens the port for input: Linux then starts init.
        on_room: called on a vCPU thread when there is room again after ``feed`` took less than it was given.
    """

    byte_wide = True

    def __init__(
        self,
        irq: IrqLine,
        output: Callable[[bytes], None],
        *,
        base: int = COM1_PORT,
        on_pending: Callable[[], None] = lambda: None,
        on_open: Callable[[], None] = lambda: None,
        on_room: Callable[[], None] = lambda: None,
    ) -> None:
        self._base = base
        self._irq = irq
        self._output = output
        self._on_pending = on_pending
        self._on_open = on_open
        self._on_room = on_room
        self._lock = Lock()  # registers and queues
        self._output_lock = Lock()  # order of calls to output; taken before _lock
        self._ier = self._lcr = self._mcr = self._scr = self._dlm = 0
        self._dll = DLL_9600
        self._fifo_enabled = False
        self._trigger = TRIGGER_LEVELS[0]
        self._rx: deque[int] = deque()
        self._waiting: deque[int] = deque()  # the host's side of the line
        self._refused = False
        self._seen_empty = False  # the guest has polled an empty FIFO while input was waiting
        self._overrun = False
        self._thre_pending = False  # the THRE interrupt's latch
        self._msr = FAR_END_UP
        self._level = False
        self._opened = False
        self._tx = bytearray()

    def ports(self) -> Sequence[range]:
        """Its eight registers."""
        return (range(self._base, self._base + UART_PORTS),)

    def feed(self, data: bytes) -> int:
        """Send ``data`` to the guest. Return how many bytes were taken; `on_room` says when to offer the rest."""
        with self._lock:
            taken = min(len(data), INPUT_QUEUE - len(self._waiting))
            self._waiting.extend(data[:taken])
            self._refused = self._refused or taken < len(data)
            self._receive()
            self._update_irq()
        return taken

    def flush(self, *, wait: bool = True) -> None:
        """Hand on the output so far. Without `wait`, leave it to a thread that does so: `on_pending` comes again."""
        if not self._output_lock.acquire(blocking=wait):
            return
        try:
            with self._lock:
                data, self._tx = bytes(self._tx), bytearray()
            if data:
                self._output(data)
        finally:
            self._output_lock.release()

    def read(self, port: int, size: int) -> int:
        """Read one register."""
        register = port - self._base
        if register == UART_LSR and not self._overrun and not self._waiting:
            # What a polling console reads once per character: it changes nothing, so it needs no lock.
            return UART_LSR_THRE | UART_LSR_TEMT | (UART_LSR_DR if self._rx else 0)
        room = False
        with self._lock:
            value = self._read(register)
            if register == UART_RX and self._refused and len(self._waiting) <= INPUT_QUEUE // 2:
                self._refused, room = False, True
        if room:
            self._on_room()
        return value

    def write(self, port: int, size: int, value: int) -> None:
        """Write one register."""
        register = port - self._base
        opened = False
        with self._lock:
            before = len(self._tx)
            self._write(register, value)
            after = len(self._tx)
            if register in (UART_IER, UART_MCR) and not self._opened:
                opened = self._opened = self._is_open()
        if after != before:
            if value == NEWLINE or after >= FLUSH_AT:
                self.flush()
                if self._tx:  # of another vCPU: our lock may have kept its flush out
                    self._on_pending()
            elif before == 0:
                self._on_pending()
        elif opened:
            self._on_open()

    def _is_open(self) -> bool:
        """Whether someone in the guest listens (Linux's probing writes IER 0x0f too, but never with RTS and OUT2)."""
        wanted = UART_MCR_RTS | UART_MCR_OUT2
        return bool(self._ier & UART_IER_RDI) and self._mcr & (wanted | UART_MCR_LOOP) == wanted

    def _read(self, register: int) -> int:
        if register in (UART_RX, UART_IER) and self._lcr & UART_LCR_DLAB:
            return self._dlm if register == UART_DLM else self._dll
        match register:
            case 0:  # UART_RX
                value = self._rx.popleft() if self._rx else 0
                if not self._ier & UART_IER_RDI:
                    self._receive()
                self._update_irq()
                return value
            case 1:  # UART_IER
                return self._ier
            case 2:  # UART_IIR
                source = self._interrupt()
                if source == UART_IIR_THRI:
                    self._thre_pending = False  # reading it is the acknowledgement
                    self._update_irq()
                elif source == UART_IIR_NO_INT and self._waiting:
                    self._receive()
                    self._update_irq()
                return source | (UART_IIR_FIFO_ENABLED if self._fifo_enabled else 0)
            case 3:  # UART_LCR
                return self._lcr
            case 4:  # UART_MCR
                return self._mcr
            case 5:  # UART_LSR
                value = UART_LSR_THRE | UART_LSR_TEMT | (UART_LSR_DR if self._rx else 0)
                if self._overrun:
                    value |= UART_LSR_OE
                    self._overrun = False
                    self._update_irq()
                if self._waiting and not self._rx:
                    # Seen once, it is how an interrupt handler ends. Seen twice, it is someone who polls (kgdb).
                    if self._seen_empty:
                        self._receive()
                        self._update_irq()
                    else:
                        self._seen_empty = True
                return value
            case 6:  # UART_MSR
                value = self._msr
                self._msr &= 0xF0  # the delta bits
                self._update_irq()
                return value
            case _:  # UART_SCR
                return self._scr

    def _write(self, register: int, value: int) -> None:
        if register in (UART_TX, UART_IER) and self._lcr & UART_LCR_DLAB:
            if register == UART_DLM:
                self._dlm = value
            else:
                self._dll = value
            return
        match register:
            case 0:  # UART_TX
                if self._mcr & UART_MCR_LOOP:
                    self._loop_back(value)
                else:
                    self._tx.append(value)
                self._thre_pending = True  # the byte is gone at once: empty again
            case 1:  # UART_IER
                if value & ~self._ier & UART_IER_THRI:
                    self._thre_pending = True  # enabling it with an empty transmitter raises it
                self._ier = value & 0x0F
            case 2:  # UART_FCR
                self._set_fifo(value)
            case 3:  # UART_LCR
                self._lcr = value
                return
            case 4:  # UART_MCR
                self._mcr = value & 0x1F
                self._set_modem_lines()
                self._receive()
            case 7:  # UART_SCR
                self._scr = value
                return
            case _:  # LSR and MSR: factory test only
                return
        self._update_irq()

    def _set_fifo(self, fcr: int) -> None:
        enabled = bool(fcr & UART_FCR_ENABLE_FIFO)
        if enabled != self._fifo_enabled or (enabled and fcr & UART_FCR_CLEAR_RCVR):
            self._rx.clear()
        self._fifo_enabled = enabled
        if enabled:  # without bit 0 the others are not programmed
            self._trigger = TRIGGER_LEVELS[fcr >> 6]
        self._receive()

    def _loop_back(self, value: int) -> None:
        if len(self._rx) < (FIFO_SIZE if self._fifo_enabled else 1):
            self._rx.append(value)
            return
        self._overrun = True
        if not self._fifo_enabled:
            self._rx[0] = value  # without FIFO the newer character wins

    def _set_modem_lines(self) -> None:
        """Drive the inputs: in loopback by the four outputs, else by the far end. A change sets its delta bit."""
        lines = FAR_END_UP
        if self._mcr & UART_MCR_LOOP:
            lines = (
                (UART_MSR_CTS if self._mcr & UART_MCR_RTS else 0)
                | (UART_MSR_DSR if self._mcr & UART_MCR_DTR else 0)
                | (UART_MSR_RI if self._mcr & UART_MCR_OUT1 else 0)
                | (UART_MSR_DCD if self._mcr & UART_MCR_OUT2 else 0)
            )
        changed = (self._msr ^ lines) >> 4
        if lines & UART_MSR_RI:
            changed &= ~UART_MSR_TERI  # "trailing edge": only RI's end counts
        self._msr = lines | self._msr & 0x0F | changed

    def _receive(self) -> None:
        """Move waiting input into the FIFO."""
        if self._waiting and self._mcr & (UART_MCR_RTS | UART_MCR_LOOP) == UART_MCR_RTS:
            room = (FIFO_SIZE if self._fifo_enabled else 1) - len(self._rx)
            for _ in range(min(room, len(self._waiting))):
                self._rx.append(self._waiting.popleft())
            self._seen_empty = False

    def _interrupt(self) -> int:
        """IIR bits 3:0, the pending interrupt of highest priority."""
        if self._ier & UART_IER_RLSI and self._overrun:
            return UART_IIR_RLSI
        if self._ier & UART_IER_RDI and self._rx:
            # Below the trigger level the time-out reports. Ours is 0: nothing more is on its way.
            full = not self._fifo_enabled or len(self._rx) >= self._trigger
            return UART_IIR_RDI if full else UART_IIR_RX_TIMEOUT
        if self._ier & UART_IER_THRI and self._thre_pending:
            return UART_IIR_THRI
        if self._ier & UART_IER_MSI and self._msr & 0x0F:
            return UART_IIR_MSI
        return UART_IIR_NO_INT

    def _update_irq(self) -> None:
        # In loopback the OUT2 pin is inactive, whatever its bit says.
        gated = self._mcr & (UART_MCR_OUT2 | UART_MCR_LOOP) == UART_MCR_OUT2
        level = gated and self._interrupt() != UART_IIR_NO_INT
        if level != self._level:
            self._level = level
            self._irq.set(level)
