"""The ports that every kernel pokes on a PC, where all-ones would be a costly or a wrong answer.

Most of them need no device. Unclaimed ports read all-ones and swallow writes at the price of one look-up: the POST port
0x80 (Linux's I/O delay), COM2-4 (the UART probe stops at the first read), the PCI configuration ports 0xcf8-0xcff
(all-ones is "no bridge"), Super-I/O (0x2e, 0x4e), port 0x92. The 8259s (0x20, 0xa0, 0x4d0) are KVM's. Two are different:

- Port 0x61: its bits 7:6 mean "parity error" and "I/O check" when an NMI arrives; all-ones would blame the memory.
- The 8254 timer at 0x40-0x43: Linux measures the CPU's speed with it even where ``tsc_early_khz=`` has said it
  (``quick_pit_calibrate`` by way of ``native_calibrate_cpu_early``), and reads a counter that stays at 0xff 100,000
  times. One that stays at 0 it gives up at the first read.
"""

from collections.abc import Sequence

__all__ = ["SystemControlPortB"]

PIT = range(0x40, 0x44)
PORT_B = 0x61
WRITABLE = 0x0F  # timer 2 gate, speaker, and the two NMI masks
REFRESH, TIMER_2_OUT = 0x10, 0x20


class SystemControlPortB:
    """Port 0x61 and the timer whose gate it holds, which is missing; leave it out where KVM_CREATE_PIT2 has both."""

    byte_wide = True

    def __init__(self) -> None:
        self._value = 0

    def ports(self) -> Sequence[range]:
        """The 8254's four ports, and port 0x61."""
        return (PIT, range(PORT_B, PORT_B + 1))

    def read(self, port: int, size: int) -> int:
        """Counters stand at 0. Port 0x61: the bits written; refresh toggles; timer 2 has expired, so nobody waits."""
        if port != PORT_B:
            return 0
        self._value ^= REFRESH
        return self._value | TIMER_2_OUT

    def write(self, port: int, size: int, value: int) -> None:
        """The low four bits of port 0x61; a counter takes nothing."""
        if port == PORT_B:
            self._value = self._value & REFRESH | value & WRITABLE
