"""Load a Linux guest: kernel, initrd, command line, ACPI tables and boot_params, all in guest memory."""

import os
import stat
import struct
from collections.abc import Iterable

from offmap.boot.acpi import AcpiImage
from offmap.boot.kernel_image import check_kernel, load_kernel, open_file, read_into
from offmap.boot.memory_map import MemoryMap
from offmap.boot.reset_vector import RESET_CODE, RESET_VECTOR
from offmap.errors import OffmapError
from offmap.files import FileName
from offmap.memory.guest import GuestMemory
from offmap.memory.iomem import PhysicalRange
from offmap.typed import NamedTuple
from offmap.uapi import bootparam as bp
from offmap.units import format_size

BOOT_PARAMS = 0x7000
"""Guest-physical address of the zero page. The boot CPU's GDT is below it, its page tables are above (cpu_state)."""

_CMDLINE = 0x20000


class BootSource(NamedTuple):
    """What to boot: files, and the kernel's command line."""

    kernel: FileName
    initrd: FileName | None
    command_line: str

    def check(self, memory_size: int) -> None:
        """Check the files. Call it before anything expensive is done for the guest.

        Raises:
            OffmapError: one is missing, empty, of another format, or larger than `memory_size` bytes of RAM.
        """
        check_kernel(self.kernel)
        if self.initrd is not None:
            file, size = _open_initrd(self.initrd)
            os.close(file)
            if size >= memory_size:
                raise OffmapError(
                    f"the initrd {self.initrd} ({format_size(size)}) is larger than the guest's RAM "
                    f"({format_size(memory_size)})",
                    "give the guest more with --memory-size",
                )


def load_linux(source: BootSource, memory: GuestMemory, acpi: AcpiImage, excluded: Iterable[PhysicalRange] = ()) -> int:
    """Load `source` into `memory`; pages in `excluded` are kept from the guest.

    Returns:
        The address at which the boot CPU enters (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").

    Raises:
        OffmapError: a file is missing, unreadable, no kernel, or too large for this guest.
    """
    ram = [PhysicalRange(r.guest_phys_addr, r.guest_phys_addr + r.size) for r in memory.regions]
    memory_map = MemoryMap(ram, excluded)
    memory_map.take("the boot data", _CMDLINE + bp.COMMAND_LINE_SIZE - 0x1000, at=0x1000)
    kernel = load_kernel(source.kernel, memory, memory_map)

    command_line = os.fsencode(source.command_line)  # bytes that are no text in our locale reach the guest unchanged
    room = min(kernel.cmdline_size, bp.COMMAND_LINE_SIZE - 1)
    if len(command_line) > room:
        raise OffmapError(
            f"the guest kernel's command line has {len(command_line)} bytes and this kernel takes {room}",
            "shorten --cmdline",
        )
    memory.write(_CMDLINE, command_line + b"\0")

    params = bytearray(bp.BOOT_PARAMS_SIZE)
    params[bp.SETUP_HEADER : bp.SETUP_HEADER + len(kernel.setup_header)] = kernel.setup_header
    params[bp.TYPE_OF_LOADER] = bp.TYPE_OF_LOADER_UNDEFINED
    struct.pack_into("<I", params, bp.CMD_LINE_PTR, _CMDLINE)
    struct.pack_into("<Q", params, bp.ACPI_RSDP_ADDR, acpi.rsdp_address)
    if source.initrd is not None:
        address, size = _load_initrd(source.initrd, memory, memory_map, kernel.initrd_addr_max)
        struct.pack_into("<II", params, bp.RAMDISK_IMAGE, address, size)
    entries = memory_map.e820()
    params[bp.E820_ENTRIES] = len(entries)
    for number, (start, size, kind) in enumerate(entries):
        offset = bp.E820_TABLE + number * struct.calcsize(bp.E820_ENTRY_FORMAT)
        struct.pack_into(bp.E820_ENTRY_FORMAT, params, offset, start, size, kind)
    memory.write(BOOT_PARAMS, params)
    memory.write(acpi.rsdp_address, acpi.blob)
    memory.write(RESET_VECTOR, RESET_CODE)
    return kernel.entry


def _open_initrd(path: FileName) -> tuple[int, int]:
    """Open the initrd. Return its fd, which the caller owns, and its size in bytes."""
    file = open_file(f"the initrd {path}", path)
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
        os.close(file)
        kind = "empty" if stat.S_ISREG(status.st_mode) else "not a regular file"
        raise OffmapError(f"the initrd {path} is {kind}", "leave --initrd out, or give a cpio archive")
    return file, status.st_size


def _load_initrd(path: FileName, memory: GuestMemory, memory_map: MemoryMap, address_max: int) -> tuple[int, int]:
    what = f"the initrd {path}"
    file, size = _open_initrd(path)
    try:
        address = memory_map.take(what, size, below=address_max + 1)
        read_into(file, what, 0, memory.view(address, size))
    finally:
        os.close(file)
    return address, size
