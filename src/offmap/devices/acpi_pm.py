"""Power-off and reset by ACPI, hardware-reduced: two sleep registers and a reset register (ACPI 6.4, 4.8.3.7, 4.8.3.6).

Hardware-reduced, because it spares the guest what a virtual machine has no use for: the SCI and its handler, the PM1
and GPE blocks, the PM timer, the switch into ACPI mode, and with Linux also the set-up of 8259 and PIT.
"""

from collections.abc import Callable, Sequence

from offmap.uapi.pc import ACPI_RESET_PORT, ACPI_S5_SLEEP_TYPE, ACPI_SLEEP_CONTROL_PORT, ACPI_SLEEP_STATUS_PORT

SLP_EN = 0x20  # ACPI 6.4, table 4.20: SLEEP_CONTROL_REG
SLP_TYP_SHIFT = 2
SLP_TYP_MASK = 0x7

RST_CPU = 0x04  # reset control register: the reset happens as this bit is set


class AcpiPm:
    """The registers that the FADT points at.

    Args:
        power_off: the guest has entered S5. Called on a vCPU thread, once per attempt; must make the vCPUs stop, as
            the guest then polls for the end of its life.
        reset: the guest wants to be reset. Called on a vCPU thread.
    """

    byte_wide = True

    def __init__(self, power_off: Callable[[], None], reset: Callable[[], None]) -> None:
        self._power_off = power_off
        self._reset = reset
        self._reset_control = 0

    def ports(self) -> Sequence[range]:
        """Sleep control, sleep status, reset control."""
        return (
            range(ACPI_SLEEP_CONTROL_PORT, ACPI_SLEEP_STATUS_PORT + 1),
            range(ACPI_RESET_PORT, ACPI_RESET_PORT + 1),
        )

    def read(self, port: int, size: int) -> int:
        """Never asleep, hence never woken: both sleep registers are 0."""
        return self._reset_control if port == ACPI_RESET_PORT else 0

    def write(self, port: int, size: int, value: int) -> None:
        """Sleep, or reset. Sleep types other than S5 are not offered and not obeyed."""
        if port == ACPI_SLEEP_CONTROL_PORT:
            if value & SLP_EN and value >> SLP_TYP_SHIFT & SLP_TYP_MASK == ACPI_S5_SLEEP_TYPE:
                self._power_off()
        elif port == ACPI_RESET_PORT:
            rising = value & ~self._reset_control & RST_CPU
            self._reset_control = value & ~RST_CPU  # the bit clears itself with the reset
            if rising:
                self._reset()
