"""Just enough of the i8042 keyboard controller to be reset by.

The ACPI tables say there is none, so Linux never probes it; only its last resort for a reboot (``reboot=kbd``, and
``native_machine_emergency_restart`` when ACPI fails) writes here: it waits for the input buffer to be empty, then
pulses the reset line. Whoever probes it all the same gets each answer at once, never a time-out, and finds neither a
keyboard nor a mouse.
"""

from collections.abc import Callable, Sequence

from offmap.uapi.pc import I8042_COMMAND_PORT, I8042_DATA_PORT

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
