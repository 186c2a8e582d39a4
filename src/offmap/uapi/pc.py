"""Where a PC's legacy devices sit: I/O ports, interrupt lines, APIC addresses.

Sources: the IBM PC/AT technical reference, and what Linux expects of it: ``arch/x86/include/asm/serial.h``
(SERIAL_PORT_DFNS), ``mc146818rtc.h``, ``i8042-io.h``, ``apicdef.h``, ``arch/x86/kernel/reboot.c`` (port 0xcf9).
The ACPI tables describe these places and the devices answer there, so both take them from here.
"""

COM1_PORT = 0x3F8
COM1_IRQ = 4
UART_PORTS = 8  # registers of a 16550A

RTC_PORT = 0x70  # index at 0x70, data at 0x71
RTC_IRQ = 8

PIT_PORT = 0x40  # counters at 0x40 to 0x42, mode at 0x43

I8042_DATA_PORT = 0x60
I8042_COMMAND_PORT = 0x64

# Ours to choose; outside 0x000-0x3ff (ISA) and where PC chipsets put their ACPI block (PIIX4: 0x600).
ACPI_SLEEP_CONTROL_PORT = 0x600
ACPI_SLEEP_STATUS_PORT = 0x601
ACPI_S5_SLEEP_TYPE = 5  # SLP_TYP for "off": what \_S5 says and the sleep control register obeys
# The reset control register of PC chipsets: what `reboot=pci` writes to, so one register serves both methods.
ACPI_RESET_PORT = 0xCF9
ACPI_RESET_VALUE = 0x06  # SYS_RST | RST_CPU

LOCAL_APIC_BASE = 0xFEE0_0000  # APIC_DEFAULT_PHYS_BASE
IO_APIC_BASE = 0xFEC0_0000  # IO_APIC_DEFAULT_PHYS_BASE; where KVM_CREATE_IRQCHIP puts it
IO_APIC_ID = 0  # what the id register of KVM's I/O APIC reads after reset
