"""Two devices that every PC kernel probes: system control port B, and the i8254 timer.

Other ports need no device. Unclaimed ports read all-ones and swallow writes at the price of one look-up: the POST port
0x80 (Linux's I/O delay), COM2-4 (the UART probe stops at the first read), the PCI configuration ports 0xcf8-0xcff
(all-ones is "no bridge"), Super-I/O (0x2e, 0x4e), port 0x92. KVM has the 8259s (0x20, 0xa0, 0x4d0).
"""

from collections.abc import Sequence

from offmap.uapi.pc import PIT_PORT

PORT_B = 0x61
WRITABLE = 0x0F  # timer 2 gate, speaker, and the two NMI masks
REFRESH, TIMER_2_OUT = 0x10, 0x20


class SystemControlPortB:
    """Port 0x61, without a timer behind it.

    Its bits 7:6 mean "parity error" and "I/O check" when an NMI arrives: all-ones would blame the memory.
    """

    byte_wide = True

    def __init__(self) -> None:
        self._value = 0

    def ports(self) -> Sequence[range]:
        """Port 0x61."""
        return (range(PORT_B, PORT_B + 1),)

    def read(self, port: int, size: int) -> int:
        """The written bits. The refresh bit toggles. Timer 2 has always expired, so that nobody waits for it."""
        self._value ^= REFRESH
        return self._value | TIMER_2_OUT

    def write(self, port: int, size: int, value: int) -> None:
        """The low four bits."""
        self._value = self._value & REFRESH | value & WRITABLE


class AbsentPit:
    """Three counters that stand at 0, and a mode register that takes anything.

    Linux calibrates the TSC before it has read in ACPI that there is no such timer: it sets a counter to 0xff.. and
    waits for it to change, 100,000 reads where the bus is empty (quick_pit_calibrate, arch/x86/kernel/tsc.c). A
    counter that stands at 0 fails its first look.
    """

    byte_wide = True

    def ports(self) -> Sequence[range]:
        """Counters 0 to 2, and mode."""
        return (range(PIT_PORT, PIT_PORT + 4),)

    def read(self, port: int, size: int) -> int:
        """0."""
        return 0

    def write(self, port: int, size: int, value: int) -> None:
        """Nothing."""
