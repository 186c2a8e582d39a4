"""The devices of the DSDT: each has an identity, and resources in its ``_CRS`` (ports, addresses, interrupts).

A resource is a descriptor of ACPI 6.4, section 6.4 (Resource Data Types for ACPI), as bytes.
"""

import struct

from offmap.boot.acpi import aml
from offmap.typed import NamedTuple
from offmap.uapi.pc import COM1_IRQ, COM1_PORT, RTC_IRQ, RTC_PORT, UART_PORTS

END_TAG = b"\x79\x00"  # checksum 0: not checked
DECODE_16 = 0x01
CONSUMER, EDGE = 0x01, 0x02  # extended interrupt descriptor, table 6.53
MEMORY_READ_WRITE = 0x01
MIN_FIXED, MAX_FIXED = 0x04, 0x08  # address space descriptor, general flags


def resource_template(*descriptors: bytes) -> bytes:
    """``ResourceTemplate () { descriptors }``."""
    return aml.buffer(b"".join(descriptors) + END_TAG)


def io(port: int, length: int) -> bytes:
    """``IO (Decode16, port, port, 1, length)``."""
    return struct.pack("<BBHHBB", 0x47, DECODE_16, port, port, 1, length)


def irq_no_flags(line: int) -> bytes:
    """``IRQNoFlags () {line}``: an ISA interrupt, edge-triggered, active high."""
    if not 0 <= line <= 15:
        raise ValueError(f"{line} is no ISA interrupt")
    return struct.pack("<BH", 0x22, 1 << line)


def interrupt(gsi: int) -> bytes:
    """``Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) {gsi}``: a global system interrupt."""
    return struct.pack("<BHBBI", 0x89, 6, CONSUMER | EDGE, 1, gsi)


def memory32_fixed(base: int, length: int) -> bytes:
    """``Memory32Fixed (ReadWrite, base, length)``: below 4 GiB."""
    return struct.pack("<BHBII", 0x86, 9, MEMORY_READ_WRITE, base, length)


def qword_memory(base: int, length: int) -> bytes:
    """``QWordMemory (ResourceConsumer, …, base, …, length)``: a fixed, uncached, read-write range anywhere."""
    return struct.pack(
        "<BHBBBQQQQQ",
        0x8A,
        0x2B,
        0,  # memory
        CONSUMER | MIN_FIXED | MAX_FIXED,
        MEMORY_READ_WRITE,
        0,  # granularity: fixed
        base,
        base + length - 1,
        0,  # no translation
        length,
    )


class AcpiDevice(NamedTuple):
    """A device of the guest, as its ACPI namespace shows it.

    Args:
        name: four characters, unique in the machine.
        hid: Plug and Play ID (``PNP0501``, three letters: stored compressed) or ACPI ID (``LNRO0005``: stored as text).
        uid: number that differs between devices of one ``hid``.
        resources: descriptors of ``_CRS``.
        terms: further AML inside the device.
    """

    name: str
    hid: str
    uid: int = 0
    resources: tuple[bytes, ...] = ()
    terms: tuple[bytes, ...] = ()

    def aml(self) -> bytes:
        """Its ``Device`` term."""
        hid = aml.eisaid(self.hid) if len(self.hid) == 7 else aml.string(self.hid)
        terms = [aml.name("_HID", hid), aml.name("_UID", aml.integer(self.uid))]
        if self.resources:
            terms.append(aml.name("_CRS", resource_template(*self.resources)))
        return aml.device(self.name, *terms, *self.terms)


def processor(number: int) -> AcpiDevice:
    """vCPU ``number``. Its ``_UID`` is the processor UID of its MADT entry."""
    return AcpiDevice(f"C{number:03X}", "ACPI0007", number)


def com1() -> AcpiDevice:
    """The console's 16550A."""
    return AcpiDevice("COM1", "PNP0501", 1, (io(COM1_PORT, UART_PORTS), irq_no_flags(COM1_IRQ)))


def rtc() -> AcpiDevice:
    """The CMOS clock."""
    return AcpiDevice("RTC", "PNP0B00", 0, (io(RTC_PORT, 2), irq_no_flags(RTC_IRQ)))


def virtio_mmio(number: int, base: int, length: int, gsi: int) -> AcpiDevice:
    """A virtio-mmio transport at ``base``, interrupting by an edge on ``gsi``.

    Linux's drivers/virtio/virtio_mmio.c finds it by LNRO0005.
    """
    memory = memory32_fixed(base, length) if base + length <= 1 << 32 else qword_memory(base, length)
    return AcpiDevice(
        f"V{number:03X}",
        "LNRO0005",
        number,
        (memory, interrupt(gsi)),
        (aml.name("_CCA", aml.integer(1)),),  # cache-coherent DMA
    )
