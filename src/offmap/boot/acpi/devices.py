"""What the DSDT says about each device: an identity and its resources."""

from typing import NamedTuple

from offmap.boot.acpi import aml
from offmap.boot.acpi.resources import interrupt, io, irq_no_flags, memory32_fixed, qword_memory, resource_template
from offmap.uapi.pc import COM1_IRQ, COM1_PORT, RTC_IRQ, RTC_PORT, UART_PORTS


class AcpiDevice(NamedTuple):
    """A device of the guest, as its ACPI namespace shows it.

    Args:
        name: four characters, unique in the machine.
        hid: Plug and Play ID (``PNP0501``, three letters: stored compressed) or ACPI ID (``LNRO0005``: stored as text).
        uid: tells devices of one ``hid`` apart.
        resources: descriptors of ``_CRS``, from boot.acpi.resources.
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
    """vCPU ``number``; ``_UID`` is what the MADT's entry calls it."""
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
