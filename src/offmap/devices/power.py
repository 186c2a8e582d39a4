"""Power-off and reset: ACPI's registers, and a keyboard controller as the last resort.

ACPI is hardware-reduced (ACPI 6.4, 4.8.3.6 and 4.8.3.7): two sleep registers and a reset register. A virtual machine
needs no SCI and no handler for it, no PM1 and GPE blocks, no PM timer, and no switch into ACPI mode. Linux also skips
the set-up of 8259 and PIT then.

The ACPI tables say that there is no i8042, so Linux never probes it. It writes there only as its last resort for a
reboot (``reboot=kbd``, and ``native_machine_emergency_restart`` when ACPI fails): it waits until the input buffer is
empty, then pulses the reset line. A guest that probes it gets each answer at once, and finds no keyboard and no mouse.
"""

from collections.abc import Callable, Sequence

from offmap.uapi.pc import (
    ACPI_RESET_PORT,
    ACPI_S5_SLEEP_TYPE,
    ACPI_SLEEP_CONTROL_PORT,
    ACPI_SLEEP_STATUS_PORT,
    I8042_COMMAND_PORT,
    I8042_DATA_PORT,
)

SLP_EN = 0x20  # ACPI 6.4, table 4.20: SLEEP_CONTROL_REG
SLP_TYP_SHIFT = 2
SLP_TYP_MASK = 0x7

RST_CPU = 0x04  # reset control register: the reset happens as this bit is set

# Names from drivers/input/serio/i8042.h; values from the IBM PC/AT technical reference.
I8042_STR_OBF = 0x01
I8042_STR_MUXERR = 0x04  # "system flag": the self test has passed
I8042_STR_CMDDAT = 0x08
I8042_STR_KEYLOCK = 0x10  # not locked

CTL_RCTR, CTL_WCTR = 0x20, 0x60
AUX_TEST = 0xA9
CTL_TEST, KBD_TEST = 0xAA, 0xAB
READ_OUTPUT, WRITE_OUTPUT = 0xD0, 0xD1
KBD_LOOP, AUX_LOOP, AUX_SEND = 0xD2, 0xD3, 0xD4
PULSE_OUTPUT = 0xF0  # to 0xff: low for 6 µs every line whose bit is 0
OUTPUT_RESET, OUTPUT_A20 = 0x01, 0x02  # output port; the reset line is active low

SELF_TEST_PASSED = 0x55
CLOCK_LINE_LOW = 0x01  # an interface test's answer where nothing is plugged in
CTR_KBD_AUX_DISABLED = 0x30
TAKES_A_BYTE = frozenset({CTL_WCTR, WRITE_OUTPUT, KBD_LOOP, AUX_LOOP, AUX_SEND})


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
        return (range(ACPI_SLEEP_CONTROL_PORT, ACPI_SLEEP_STATUS_PORT + 1), range(ACPI_RESET_PORT, ACPI_RESET_PORT + 1))

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


class I8042:
    """The controller without devices; it never interrupts.

    Args:
        reset: the guest has pulled the reset line. Called on a vCPU thread.
    """

    byte_wide = True

    def __init__(self, reset: Callable[[], None]) -> None:
        self._reset = reset
        self._control = CTR_KBD_AUX_DISABLED
        self._answer: int | None = None
        self._command: int | None = None  # waits for its parameter byte
        self._last_was_command = False

    def ports(self) -> Sequence[range]:
        """Data and command/status; the ports between belong to others (0x61)."""
        return (range(I8042_DATA_PORT, I8042_DATA_PORT + 1), range(I8042_COMMAND_PORT, I8042_COMMAND_PORT + 1))

    def read(self, port: int, size: int) -> int:
        """Status, or the answer to the last command. The input buffer is always empty."""
        if port == I8042_COMMAND_PORT:
            return (
                I8042_STR_KEYLOCK
                | I8042_STR_MUXERR
                | (I8042_STR_CMDDAT if self._last_was_command else 0)
                | (I8042_STR_OBF if self._answer is not None else 0)
            )
        answer, self._answer = self._answer, None
        return 0 if answer is None else answer

    def write(self, port: int, size: int, value: int) -> None:
        """A command, or its parameter."""
        self._last_was_command = port == I8042_COMMAND_PORT
        if port == I8042_COMMAND_PORT:
            self._run(value)
        elif self._command is not None:
            command, self._command = self._command, None
            self._take(command, value)
        # A byte for the keyboard goes nowhere.

    def _run(self, command: int) -> None:
        self._command = command if command in TAKES_A_BYTE else None
        if command >= PULSE_OUTPUT:
            if not command & OUTPUT_RESET:
                self._reset()
        elif command == CTL_RCTR:
            self._answer = self._control
        elif command == CTL_TEST:
            self._answer = SELF_TEST_PASSED
        elif command in (AUX_TEST, KBD_TEST):
            self._answer = CLOCK_LINE_LOW
        elif command == READ_OUTPUT:
            self._answer = OUTPUT_RESET | OUTPUT_A20
        # Enabling and disabling interfaces without devices changes nothing that could be seen.

    def _take(self, command: int, value: int) -> None:
        if command == CTL_WCTR:
            self._control = value
        elif command == KBD_LOOP:
            self._answer = value
        elif command == AUX_LOOP:
            self._answer = value ^ 0xFF  # not what was sent: there is no auxiliary port
        elif command == WRITE_OUTPUT and not value & OUTPUT_RESET:
            self._reset()
