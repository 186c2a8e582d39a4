"""System control port B, and nothing else: what a PC has at the ports that every kernel pokes.

Most of them need no device. Unclaimed ports read all-ones and swallow writes at the price of one look-up: the POST port
0x80 (Linux's I/O delay), COM2-4 (the UART probe stops at the first read), the PCI configuration ports 0xcf8-0xcff
(all-ones is "no bridge"), Super-I/O (0x2e, 0x4e), port 0x92. The 8259s (0x20, 0xa0, 0x4d0) are KVM's, the timer is
devices/pit.py. Port 0x61 is different, as its bits 7:6 mean "parity error" and "I/O check" when an NMI arrives:
all-ones would blame the memory.
"""

from collections.abc import Sequence

PORT_B = 0x61
WRITABLE = 0x0F  # timer 2 gate, speaker, and the two NMI masks
REFRESH, TIMER_2_OUT = 0x10, 0x20


class SystemControlPortB:
    """Port 0x61, without a timer behind it."""

    byte_wide = True

    def __init__(self) -> None:
        self._value = 0

    def ports(self) -> Sequence[range]:
        """Port 0x61."""
        return (range(PORT_B, PORT_B + 1),)

    def read(self, port: int, size: int) -> int:
        """The bits written; the refresh bit toggles; timer 2 has always expired, so that nobody waits for it."""
        self._value ^= REFRESH
        return self._value | TIMER_2_OUT

    def write(self, port: int, size: int, value: int) -> None:
        """The low four bits."""
        self._value = self._value & REFRESH | value & WRITABLE
