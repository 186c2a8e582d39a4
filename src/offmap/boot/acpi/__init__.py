"""ACPI tables for a guest, written from scratch: ``build_tables`` is all that a VMM needs."""

from offmap.boot.acpi.devices import AcpiDevice, virtio_mmio
from offmap.boot.acpi.tables import ACPI_BASE, AcpiImage, build_tables

__all__ = ["ACPI_BASE", "AcpiDevice", "AcpiImage", "build_tables", "virtio_mmio"]
