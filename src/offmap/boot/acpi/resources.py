"""Resource descriptors: the ports, addresses and interrupts in a device's ``_CRS``.

Each function returns one descriptor, ``resource_template`` the buffer that holds them. Source: ACPI 6.4, section 6.4
(Resource Data Types for ACPI).
"""

import struct
from collections.abc import Sequence

from offmap.boot.acpi.aml import buffer

__all__ = ["interrupt", "io", "irq", "irq_no_flags", "memory32_fixed", "qword_memory", "resource_template"]

END_TAG = b"\x79\x00"  # checksum 0: not checked
DECODE_16 = 0x01
CONSUMER, EDGE, ACTIVE_LOW, SHARED = 0x01, 0x02, 0x04, 0x08  # extended interrupt descriptor, table 6.53
MEMORY_READ_WRITE = 0x01
MIN_FIXED, MAX_FIXED = 0x04, 0x08  # address space descriptor, general flags


def resource_template(*descriptors: bytes) -> bytes:
    """``ResourceTemplate () { descriptors }``."""
    return buffer(b"".join(descriptors) + END_TAG)


def io(port: int, length: int, *, alignment: int = 1) -> bytes:
    """``IO (Decode16, port, port, alignment, length)``."""
    return struct.pack("<BBHHBB", 0x47, DECODE_16, port, port, alignment, length)


def _irq_mask(lines: Sequence[int]) -> int:
    mask = 0
    for line in lines:
        if not 0 <= line <= 15:
            raise ValueError(f"{line} is no ISA interrupt")
        mask |= 1 << line
    return mask


def irq_no_flags(*lines: int) -> bytes:
    """``IRQNoFlags () {lines}``: ISA interrupts, edge-triggered, active high."""
    return struct.pack("<BH", 0x22, _irq_mask(lines))


def irq(*lines: int, level: bool = False, active_low: bool = False, shared: bool = False) -> bytes:
    """``IRQ (mode, polarity, sharing) {lines}``: ISA interrupts."""
    info = (0 if level else 0x01) | (0x08 if active_low else 0) | (0x10 if shared else 0)
    return struct.pack("<BHB", 0x23, _irq_mask(lines), info)


def interrupt(*gsis: int, level: bool = False, active_low: bool = False, shared: bool = False) -> bytes:
    """``Interrupt (ResourceConsumer, mode, polarity, sharing) {gsis}``: global system interrupts."""
    flags = CONSUMER | (0 if level else EDGE) | (ACTIVE_LOW if active_low else 0) | (SHARED if shared else 0)
    return struct.pack(f"<BHBB{len(gsis)}I", 0x89, 2 + 4 * len(gsis), flags, len(gsis), *gsis)


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
