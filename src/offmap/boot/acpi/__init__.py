"""ACPI tables for a guest. A VMM needs only ``build_tables``."""

from offmap.boot.acpi.devices import AcpiDevice, virtio_mmio
from offmap.boot.acpi.tables import ACPI_BASE, AcpiImage, build_tables

__all__ = ["ACPI_BASE", "AcpiDevice", "AcpiImage", "build_tables", "virtio_mmio"]
