"""Guest kernels: bzImage (by its 64-bit entry) and ELF vmlinux.

Parsing needs the first bytes of the file only. The host kernel moves the rest from the file into guest memory.
Sources: Documentation/arch/x86/boot.rst; the ELF specification.
"""

import errno
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

from offmap.boot.memory_map import MemoryMap
from offmap.errors import KernelError, OffmapError
from offmap.files import FileName
from offmap.memory.guest import GuestMemory
from offmap.typed import NamedTuple
from offmap.uapi import bootparam as bp
from offmap.uapi.page import PAGE_MASK

_HEAD = 0x10000  # enough for the setup header and for the program headers of a vmlinux
_BOUNCE = 1 << 20
_ELFMAG = b"\x7fELF"
_OFF_T_MAX = (1 << 63) - 1
_REMEDY = "give a bzImage (like /boot/vmlinuz-…) or an ELF vmlinux for x86-64"
_DEFAULT_INITRD_ADDR_MAX = 0x7FFFFFFF


class LoadedKernel(NamedTuple):
    """A kernel in guest memory.

    Attributes:
        entry: where the boot CPU starts, in long mode.
        setup_header: for boot_params, from offset 0x1f1 on.
        initrd_addr_max: the highest address that a byte of the initrd may have.
        cmdline_size: the longest command line it takes, in bytes without the final zero.
    """

    entry: int
    setup_header: bytes
    initrd_addr_max: int
    cmdline_size: int


def read_into(file: int, what: str, offset: int, view: memoryview) -> None:
    """Fill `view` from `file`; the kernel does the copying.

    Raises:
        OffmapError: the file is too short.
        KernelError: the file cannot be read.
    """
    done = 0
    if offset + len(view) > _OFF_T_MAX:
        raise OffmapError(f"{what} is truncated", "copy it again", why="its headers point beyond any file's end")
    while done < len(view):
        try:
            count = os.preadv(file, [view[done:]], offset + done)
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise KernelError(f"reading {what}", error) from None
            count = _read_bounced(file, what, offset + done, view[done:])
        if count == 0:
            why = f"{offset + len(view)} bytes are expected and {os.fstat(file).st_size} are there"
            raise OffmapError(f"{what} is truncated", "copy it again", why=why)
        done += count


def _read_bounced(file: int, what: str, offset: int, view: memoryview) -> int:
    """Read through ordinary memory, for file systems that read into the caller's pages by GUP.

    GUP refuses hidden RAM (VM_PFNMAP and memfd_secret mappings alike); uncached 9p and direct I/O use it.
    """
    try:
        data = os.pread(file, min(len(view), _BOUNCE), offset)
    except OSError as error:
        raise KernelError(f"reading {what}", error) from None
    view[: len(data)] = data
    return len(data)


def open_file(what: str, path: FileName, remedy: str = "") -> int:
    """Open `path` for reading. Return its fd, which the caller owns. Raises KernelError if it cannot be opened."""
    try:
        # O_NONBLOCK: do not wait for the writer of a FIFO.
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise KernelError(f"open of {what}", error, remedy) from None


def check_kernel(path: FileName) -> None:
    """Check the file's first bytes. Call it before anything expensive is done for the guest.

    Raises:
        OffmapError: it is missing, empty, or of another format.
    """
    with _opened(path) as (_, head):
        _is_elf(path, head)


def load_kernel(path: FileName, memory: GuestMemory, memory_map: MemoryMap) -> LoadedKernel:
    """Load the kernel at `path`. It takes its memory from `memory_map`.

    Raises:
        OffmapError: it is missing, empty, truncated, no x86-64 kernel, or does not fit.
    """
    with _opened(path) as (file, head):
        load = _load_elf if _is_elf(path, head) else _load_bzimage
        return load(file, f"guest kernel {path}", head, memory, memory_map)


@contextmanager
def _opened(path: FileName) -> Iterator[tuple[int, bytes]]:
    """The file's fd and its first bytes."""
    file = open_file(f"the guest kernel {path}", path, _REMEDY)
    try:
        try:
            head = os.pread(file, _HEAD, 0)
        except OSError as error:
            raise KernelError(f"reading the guest kernel {path}", error, _REMEDY) from None
        yield file, head
    finally:
        os.close(file)


def _is_elf(path: FileName, head: bytes) -> bool:
    if head[:4] == _ELFMAG:
        return True
    if head[bp.HEADER : bp.HEADER + 4] == bp.HEADER_MAGIC:
        return False
    if not head:
        raise OffmapError(f"guest kernel {path} is empty", _REMEDY)
    raise OffmapError(f"guest kernel {path} is neither a bzImage nor an ELF file", _REMEDY)


def _load_bzimage(file: int, what: str, head: bytes, memory: GuestMemory, memory_map: MemoryMap) -> LoadedKernel:
    if len(head) < bp.INIT_SIZE + 4:
        raise OffmapError(f"{what} is truncated: its setup header ends after {len(head)} bytes", _REMEDY)

    def field(fmt: str, offset: int) -> int:
        value: int = struct.unpack_from(fmt, head, offset)[0]
        return value

    version = field("<H", bp.VERSION)
    if version < 0x20C or not field("<H", bp.XLOADFLAGS) & bp.XLF_KERNEL_64:
        raise OffmapError(
            f"{what} has no 64-bit entry (boot protocol {version >> 8}.{version & 0xFF})",
            "use an x86-64 kernel since 3.8",
        )
    code_offset = ((field("<B", bp.SETUP_SECTS) or 4) + 1) * 512
    code_size = field("<I", bp.SYSSIZE) * 16
    # The decompressor runs at pref_address if it can, and needs init_size bytes there.
    init_size = max(field("<I", bp.INIT_SIZE), code_size)
    preferred = field("<Q", bp.PREF_ADDRESS)
    try:
        address = memory_map.take("the guest kernel", init_size, at=preferred)
    except OffmapError:
        if not field("<B", bp.RELOCATABLE_KERNEL):
            raise
        # From below pref_address it would move itself there, into whatever is in the way.
        alignment = field("<I", bp.KERNEL_ALIGNMENT) or 1 << 21
        address = memory_map.take("the guest kernel", init_size, alignment=alignment, above=preferred)
    read_into(file, what, code_offset, memory.view(address, code_size))
    header_end = bp.HEADER + head[bp.JUMP + 1]
    return LoadedKernel(
        entry=address + bp.ENTRY_64_OFFSET,
        setup_header=head[bp.SETUP_HEADER : header_end],
        initrd_addr_max=field("<I", bp.INITRD_ADDR_MAX),
        cmdline_size=field("<I", bp.CMDLINE_SIZE) or 255,
    )


def _load_elf(file: int, what: str, head: bytes, memory: GuestMemory, memory_map: MemoryMap) -> LoadedKernel:
    from offmap.uapi import elf  # a bzImage, which most kernels are, need not wait for it

    if len(head) < elf.ELF64_EHDR.size:
        raise OffmapError(f"{what} is truncated: its ELF header ends after {len(head)} bytes", _REMEDY)
    ehdr = elf.Elf64_Ehdr._make(elf.ELF64_EHDR.unpack_from(head))
    if ehdr.e_ident[4] != elf.ELFCLASS64 or ehdr.e_ident[5] != elf.ELFDATA2LSB or ehdr.e_machine != elf.EM_X86_64:
        raise OffmapError(f"{what} is an ELF file for another machine than x86-64", _REMEDY)
    if ehdr.e_type != elf.ET_EXEC:
        raise OffmapError(f"{what} is an ELF file, but no kernel (e_type {ehdr.e_type}, not ET_EXEC)", _REMEDY)
    table_end = ehdr.e_phoff + ehdr.e_phnum * elf.ELF64_PHDR.size
    if ehdr.e_phentsize != elf.ELF64_PHDR.size or ehdr.e_phnum == 0 or table_end > len(head):
        raise OffmapError(f"{what} has no program headers in its first {_HEAD} bytes", _REMEDY)
    size = ehdr.e_phnum * elf.ELF64_PHDR.size
    phdrs = map(elf.Elf64_Phdr._make, elf.ELF64_PHDR.iter_unpack(head[ehdr.e_phoff : ehdr.e_phoff + size]))
    loads = [phdr for phdr in phdrs if phdr.p_type == elf.PT_LOAD and phdr.p_memsz]
    if not loads or not any(p.p_paddr <= ehdr.e_entry < p.p_paddr + p.p_memsz for p in loads):
        raise OffmapError(f"{what} has no loadable segment at its entry {ehdr.e_entry:#x}", _REMEDY)
    if any(phdr.p_filesz > phdr.p_memsz for phdr in loads):
        raise OffmapError(f"{what} has a segment that is larger in the file than in memory", _REMEDY)
    loads.sort(key=lambda phdr: phdr.p_paddr)
    if any(low.p_paddr + low.p_memsz > high.p_paddr for low, high in pairwise(loads)):
        # Without this check, a small file could make us copy all of RAM a thousand times.
        raise OffmapError(f"{what} has segments that overlap in memory", _REMEDY)
    start = min(phdr.p_paddr for phdr in loads) & PAGE_MASK
    end = max(phdr.p_paddr + phdr.p_memsz for phdr in loads)
    memory_map.take("the guest kernel", end - start, at=start)
    for phdr in loads:
        read_into(file, what, phdr.p_offset, memory.view(phdr.p_paddr, phdr.p_filesz))
    # The header that a boot loader copies from a bzImage (boot.rst, "The real-mode kernel header").
    header = bytearray(bp.INIT_SIZE + 4 - bp.SETUP_HEADER)
    struct.pack_into("<H", header, bp.BOOT_FLAG - bp.SETUP_HEADER, bp.BOOT_FLAG_MAGIC)
    struct.pack_into("<4sH", header, bp.HEADER - bp.SETUP_HEADER, bp.HEADER_MAGIC, 0x20F)
    header[bp.LOADFLAGS - bp.SETUP_HEADER] = bp.LOADED_HIGH
    return LoadedKernel(ehdr.e_entry, bytes(header), _DEFAULT_INITRD_ADDR_MAX, bp.COMMAND_LINE_SIZE - 1)
