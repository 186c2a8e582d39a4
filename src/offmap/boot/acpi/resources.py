"""Resource descriptors: the ports, addresses and interrupts in a device's ``_CRS``.

Each function returns one descriptor, ``resource_template`` the buffer that holds them. Source: ACPI 6.4, section 6.4
(Resource Data Types for ACPI).
"""

import struct

from offmap.boot.acpi.aml import buffer

END_TAG = b"\x79\x00"  # checksum 0: not checked
DECODE_16 = 0x01
CONSUMER, EDGE = 0x01, 0x02  # extended interrupt descriptor, table 6.53
MEMORY_READ_WRITE = 0x01
MIN_FIXED, MAX_FIXED = 0x04, 0x08  # address space descriptor, general flags


def resource_template(*descriptors: bytes) -> bytes:
    """``ResourceTemplate () { descriptors }``."""
    return buffer(b"".join(descriptors) + END_TAG)


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
