"""The ACPI tables of a guest: RSDP, XSDT, FADT, MADT, DSDT.

The machine is hardware-reduced (ACPI 6.4, section 4.1): no SCI, no PM1 or GPE blocks, no PM timer, no FACS. Linux on
x86 then uses no 8259 and no PIT either (``acpi_generic_reduced_hw_init``). So the guest needs its TSC frequency and a
TSC-deadline timer from the VMM. Linux reboots such a machine through EFI or the BIOS, not by the reset register, and so
needs boot/reset_vector.py. Flags keep Linux from probing for what is absent: VGA, the keyboard controller, PCI's MSI.
The CMOS clock is there. Layouts: ACPI 6.4, chapter 5.2.
"""

import struct
from collections.abc import Sequence

from offmap.boot.acpi import aml
from offmap.boot.acpi.devices import AcpiDevice, com1, processor, rtc
from offmap.errors import OffmapError
from offmap.typed import NamedTuple
from offmap.uapi import pc

ACPI_BASE = 0xE0000  # in the BIOS read-only area, which is searched for an RSDP (5.2.5.1)
MAX_VCPUS = 254  # local APIC entries hold 8-bit ids, 255 is broadcast

OEM_ID, OEM_TABLE_ID, CREATOR_ID = b"OFFMAP", b"OFFMAPVM", b"OFFM"
HEADER = struct.Struct("<4sIBB6s8sI4sI")  # struct acpi_table_header
RSDP = struct.Struct("<8sB6sBIIQB3x")  # struct acpi_table_rsdp
RSDP_V1_SIZE = 20
CHECKSUM_OFFSET = 9
ALIGNMENT = 16

# FADT, 5.2.9
FADT_REVISION, FADT_MINOR, FADT_SIZE = 6, 3, 276
ACPI_FADT_NO_VGA, ACPI_FADT_NO_MSI, ACPI_FADT_NO_ASPM = 0x04, 0x08, 0x10  # boot_flags; bits 0, 1, 5: see below
ACPI_FADT_LEGACY_DEVICES = 0x01
ACPI_FADT_WBINVD, ACPI_FADT_C1_SUPPORTED = 1 << 0, 1 << 2
ACPI_FADT_POWER_BUTTON, ACPI_FADT_SLEEP_BUTTON, ACPI_FADT_FIXED_RTC = 1 << 4, 1 << 5, 1 << 6  # not fixed hardware
ACPI_FADT_RESET_REGISTER, ACPI_FADT_HW_REDUCED = 1 << 10, 1 << 20
GENERIC_ADDRESS = struct.Struct("<BBBBQ")  # struct acpi_generic_address
SYSTEM_IO, BYTE_ACCESS = 1, 1
CENTURY = 0x32  # CMOS register

# MADT, 5.2.12
MADT_REVISION = 5
ACPI_MADT_PCAT_COMPAT = 1
ACPI_MADT_ENABLED = 1
LOCAL_APIC, IO_APIC, INTERRUPT_OVERRIDE, LOCAL_APIC_NMI = 0, 1, 2, 4
ALL_PROCESSORS = 0xFF
TIMER_IRQ, TIMER_GSI = 0, 2  # KVM's default routing: the timer is on pin 2 of the I/O APIC, the 8259 chain on pin 0


class AcpiImage(NamedTuple):
    """Tables ready to be copied into guest memory.

    Attributes:
        rsdp_address: guest-physical address of the blob, for ``boot_params.acpi_rsdp_addr``.
        blob: the tables. They start with the RSDP, the root pointer.
    """

    rsdp_address: int
    blob: bytes


def build_tables(vcpus: int, devices: Sequence[AcpiDevice] = (), *, base: int = ACPI_BASE) -> AcpiImage:
    """Describe a machine of ``vcpus`` (1-254), COM1, the CMOS clock and ``devices``.

    Raises:
        OffmapError: more vCPUs than a local APIC id can tell apart, or none, or two devices of one name.
    """
    if not 1 <= vcpus <= MAX_VCPUS:
        raise OffmapError(f"a guest cannot have {vcpus} vCPUs", f"ask for 1 to {MAX_VCPUS}")
    shown = [*(processor(number) for number in range(vcpus)), com1(), rtc(), *devices]
    if len({device.name for device in shown}) != len(shown):
        raise OffmapError("two devices of the guest have the same ACPI name", "number them apart")
    if base % ALIGNMENT:
        raise ValueError(f"ACPI tables cannot start at {base:#x}: an RSDP is aligned to {ALIGNMENT}")
    blob = bytearray(RSDP.size)

    def place(table: bytes) -> int:
        blob.extend(bytes(-len(blob) % ALIGNMENT))
        address = base + len(blob)
        blob.extend(table)
        return address

    dsdt = place(_dsdt(shown))
    listed = (place(_fadt(dsdt)), place(_madt(vcpus)))
    xsdt = place(_table(b"XSDT", 1, struct.pack(f"<{len(listed)}Q", *listed)))
    blob[: RSDP.size] = _rsdp(xsdt)
    return AcpiImage(base, bytes(blob))


def _checksum(data: bytes | bytearray) -> int:
    """The byte that makes all bytes of ``data`` sum up to 0."""
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    header = HEADER.pack(signature, HEADER.size + len(body), revision, 0, OEM_ID, OEM_TABLE_ID, 1, CREATOR_ID, 1)
    table = bytearray(header + body)
    table[CHECKSUM_OFFSET] = _checksum(table)
    return bytes(table)


def _rsdp(xsdt: int) -> bytes:
    # No 32-bit RSDT (address 0): readers of revision 2 take the XSDT.
    rsdp = bytearray(RSDP.pack(b"RSD PTR ", 0, OEM_ID, 2, 0, RSDP.size, xsdt, 0))
    rsdp[8] = _checksum(rsdp[:RSDP_V1_SIZE])
    rsdp[32] = _checksum(rsdp)
    return bytes(rsdp)


def _io_register(port: int) -> bytes:
    return GENERIC_ADDRESS.pack(SYSTEM_IO, 8, 0, BYTE_ACCESS, port)


def _fadt(dsdt: int) -> bytes:
    fadt = bytearray(FADT_SIZE - HEADER.size)

    def put(offset: int, data: bytes) -> None:
        fadt[offset - HEADER.size : offset - HEADER.size + len(data)] = data

    put(40, struct.pack("<I", dsdt if dsdt < 1 << 32 else 0))  # DSDT
    put(108, bytes([CENTURY]))
    # IAPC_BOOT_ARCH: bit 1 (an i8042) clear, so Linux does not probe it; bit 5 (no CMOS clock) clear.
    put(109, struct.pack("<H", ACPI_FADT_LEGACY_DEVICES | ACPI_FADT_NO_VGA | ACPI_FADT_NO_MSI | ACPI_FADT_NO_ASPM))
    flags = (
        ACPI_FADT_WBINVD
        | ACPI_FADT_C1_SUPPORTED
        | ACPI_FADT_POWER_BUTTON
        | ACPI_FADT_SLEEP_BUTTON
        | ACPI_FADT_FIXED_RTC
        | ACPI_FADT_RESET_REGISTER
        | ACPI_FADT_HW_REDUCED
    )
    put(112, struct.pack("<I", flags))
    put(116, _io_register(pc.ACPI_RESET_PORT))
    put(128, bytes([pc.ACPI_RESET_VALUE]))
    put(131, bytes([FADT_MINOR]))
    put(140, struct.pack("<Q", dsdt))  # X_DSDT
    put(244, _io_register(pc.ACPI_SLEEP_CONTROL_PORT))
    put(256, _io_register(pc.ACPI_SLEEP_STATUS_PORT))
    put(268, OEM_ID.ljust(8, b"\0"))  # hypervisor vendor identity
    return _table(b"FACP", FADT_REVISION, bytes(fadt))


def _madt(vcpus: int) -> bytes:
    body = struct.pack("<II", pc.LOCAL_APIC_BASE, ACPI_MADT_PCAT_COMPAT)
    for number in range(vcpus):
        body += struct.pack("<BBBBI", LOCAL_APIC, 8, number, number, ACPI_MADT_ENABLED)
    body += struct.pack("<BBBBII", IO_APIC, 12, pc.IO_APIC_ID, 0, pc.IO_APIC_BASE, 0)
    body += struct.pack("<BBBBIH", INTERRUPT_OVERRIDE, 10, 0, TIMER_IRQ, TIMER_GSI, 0)
    body += struct.pack("<BBBHB", LOCAL_APIC_NMI, 6, ALL_PROCESSORS, 0, 1)  # on LINT1, as on a PC
    return _table(b"APIC", MADT_REVISION, body)


def _dsdt(devices: Sequence[AcpiDevice]) -> bytes:
    sleep = aml.package(aml.integer(pc.ACPI_S5_SLEEP_TYPE), aml.integer(0), aml.integer(0), aml.integer(0))
    body = aml.name(r"\_S5", sleep) + aml.scope(r"\_SB", *(device.aml() for device in devices))
    return _table(b"DSDT", 2, body)
