"""Where a PC has its i8254 timer: ports that answer, and no timer.

All-ones would be wrong here. Linux, which calibrates the TSC before it has read that ACPI promises no such timer, waits
for a counter that it has set to 0xff.. to leave that value, and reads an empty bus 100,000 times
(quick_pit_calibrate in arch/x86/kernel/tsc.c). A counter that stands at 0 fails its first look.
"""

from collections.abc import Sequence

from offmap.uapi.pc import PIT_PORT


class AbsentPit:
    """Three counters that stand at 0, and a mode register that takes anything."""

    byte_wide = True

    def ports(self) -> Sequence[range]:
        """Counters 0 to 2, and mode."""
        return (range(PIT_PORT, PIT_PORT + 4),)

    def read(self, port: int, size: int) -> int:
        """0."""
        return 0

    def write(self, port: int, size: int, value: int) -> None:
        """Nothing."""
