"""The ways a guest ends: ACPI sleep and reset registers, keyboard controller; and port 0x61."""

import pytest

from offmap.devices.bus import PioBus
from offmap.devices.legacy import SystemControlPortB
from offmap.devices.power import I8042, AcpiPm


class Machine:
    """All of them on one bus; notes what the guest asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.bus = PioBus()
        self.bus.attach(AcpiPm(lambda: self.asked.append("off"), lambda: self.asked.append("reset")))
        self.bus.attach(I8042(lambda: self.asked.append("reset")))
        self.bus.attach(SystemControlPortB())

    def inb(self, port: int) -> int:
        return self.bus.read(port, 1)

    def outb(self, value: int, port: int) -> None:
        self.bus.write(port, 1, value)


@pytest.fixture
def machine() -> Machine:
    return Machine()


def test_s5_as_acpica_enters_it(machine: Machine) -> None:
    """acpi_hw_extended_sleep: clear WAK_STS, then SLP_TYP with SLP_EN."""
    machine.outb(0x80, 0x601)
    assert machine.asked == []
    machine.outb(5 << 2 | 0x20, 0x600)
    assert machine.asked == ["off"]
    assert machine.inb(0x601) == 0


@pytest.mark.parametrize("value", [0x00, 5 << 2, 0x20, 3 << 2 | 0x20])
def test_nothing_else_powers_off(machine: Machine, value: int) -> None:
    machine.outb(value, 0x600)
    assert machine.asked == []


def test_reset_register_as_acpi_writes_it(machine: Machine) -> None:
    machine.outb(0x06, 0xCF9)
    assert machine.asked == ["reset"]


def test_reset_register_as_linux_reboots_by_pci(machine: Machine) -> None:
    """BOOT_CF9_FORCE in native_machine_emergency_restart."""
    cf9 = machine.inb(0xCF9) & ~0x06
    machine.outb(cf9 | 2, 0xCF9)
    assert machine.asked == []
    machine.outb(cf9 | 0x06, 0xCF9)
    assert machine.asked == ["reset"]


def test_pci_s_configuration_address_does_not_reset(machine: Machine) -> None:
    """pci_check_type1: a byte to 0xcfb, 32 bits to 0xcf8."""
    machine.outb(0x01, 0xCFB)
    machine.bus.write(0xCF8, 4, 0x80000000)
    assert machine.bus.read(0xCF8, 4) == 0xFFFFFFFF
    assert machine.asked == []


def test_reset_by_keyboard_controller(machine: Machine) -> None:
    """BOOT_KBD: kb_wait until the input buffer is empty, then pulse."""
    assert not machine.inb(0x64) & 0x02
    machine.outb(0xFE, 0x64)
    assert machine.asked == ["reset"]


def test_reset_by_the_output_port(machine: Machine) -> None:
    machine.outb(0xD1, 0x64)
    machine.outb(0x03, 0x60)
    assert machine.asked == []
    machine.outb(0xD1, 0x64)
    machine.outb(0xFE, 0x60)
    assert machine.asked == ["reset"]


def test_every_probe_of_the_keyboard_controller_is_answered_at_once(machine: Machine) -> None:
    def ask(command: int, *parameters: int) -> int:
        machine.outb(command, 0x64)
        for parameter in parameters:
            machine.outb(parameter, 0x60)
        assert machine.inb(0x64) & 0x01, "an answer waits"
        answer = machine.inb(0x60)
        assert not machine.inb(0x64) & 0x01
        return answer

    assert ask(0xAA) == 0x55
    machine.outb(0x60, 0x64)
    machine.outb(0x74, 0x60)
    assert ask(0x20) == 0x74
    assert ask(0xD3, 0x5A) != 0x5A, "no auxiliary port"
    assert ask(0xA9) == ask(0xAB) == 0x01, "nothing plugged in"
    assert ask(0xD0) & 0x03 == 0x03
    assert ask(0xD2, 0x42) == 0x42
    machine.outb(0xED, 0x60)
    assert machine.inb(0x60) == 0
    assert machine.asked == []


def test_port_b_reports_no_nmi_reason_and_its_timer_has_expired(machine: Machine) -> None:
    first, second = machine.inb(0x61), machine.inb(0x61)
    assert (first ^ second) & 0x10, "the refresh bit toggles"
    assert first & 0xE0 == 0x20
    machine.outb(0xFF, 0x61)
    assert machine.inb(0x61) & 0xCF == 0x0F
