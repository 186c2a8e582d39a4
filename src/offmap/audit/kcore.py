"""/proc/kcore: the kernel's own view of memory, read by virtual or by physical address.

Source: ``fs/proc/kcore.c``. A read of what cannot be read (a hole, an offline or poisoned page, a page that is not
in the direct map) succeeds and gives zeroes, so a zero that was read proves nothing: every caller decides from
page-table entries and page flags, and proves the reader itself with a positive control.
"""

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from offmap.audit.pageflags import PageFlags
from offmap.audit.procfs import open_path
from offmap.audit.vmcoreinfo import START_KERNEL_MAP, VmcoreInfo, find_note
from offmap.errors import Undetermined
from offmap.owned import Owned
from offmap.uapi.elf import (
    ELF64_EHDR,
    ELF64_PHDR,
    ELFMAG,
    EM_X86_64,
    ET_CORE,
    PT_LOAD,
    PT_NOTE,
    Elf64_Ehdr,
    Elf64_Phdr,
)
from offmap.uapi.page import PAGE_SHIFT, PAGE_SIZE

_NO_PADDR = (1 << 64) - 1  # p_paddr of a segment that is not physically contiguous (elf_kcore: -1)
_CAP_SYS_RAWIO = 17  # include/uapi/linux/capability.h
_HEADER_LIMIT = 1 << 20  # far above what PN_XNUM program headers would take


@dataclass(frozen=True)
class Segment:
    """A PT_LOAD of /proc/kcore: ``pa`` is None where the range is not physically contiguous (vmalloc, vmemmap)."""

    va: int
    pa: int | None
    size: int
    offset: int

    @property
    def is_ram(self) -> bool:
        """Part of the direct map (KCORE_RAM), rather than the kernel image or a virtual area."""
        return self.pa is not None and self.va < START_KERNEL_MAP


def parse_program_headers(data: bytes, path: str = "/proc/kcore") -> list[Elf64_Phdr]:
    """Program headers of an x86-64 ELF core whose first bytes are ``data``; Undetermined if they are not all there."""
    if len(data) < ELF64_EHDR.size or not data.startswith(ELFMAG):
        raise Undetermined(f"{path} is not an ELF file")
    header = Elf64_Ehdr._make(ELF64_EHDR.unpack_from(data))
    if header.e_type != ET_CORE or header.e_machine != EM_X86_64 or header.e_phentsize != ELF64_PHDR.size:
        raise Undetermined(f"{path} is not an x86-64 core file")
    if header.e_phoff + header.e_phnum * ELF64_PHDR.size > len(data):
        raise Undetermined(f"{path} ends within its program headers")
    headers = data[header.e_phoff : header.e_phoff + header.e_phnum * ELF64_PHDR.size]
    return [Elf64_Phdr._make(each) for each in ELF64_PHDR.iter_unpack(headers)]


def direct_map_base(segments: Sequence[Segment]) -> int:
    """``page_offset_base``: what the direct map adds to a physical address; Undetermined without a RAM segment.

    VMCOREINFO does not name it. It is the difference that most of the RAM segments have in common.
    """
    bases = Counter(segment.va - segment.pa for segment in segments if segment.is_ram and segment.pa is not None)
    if not bases:
        raise Undetermined("/proc/kcore has no RAM segment, so the direct map cannot be found")
    return bases.most_common(1)[0][0]


class Kcore(Owned):
    """An open /proc/kcore together with /proc/kpageflags. Reads go into buffers of the caller.

    Raises:
        Undetermined: there is no /proc/kcore, it may not be read, or it lacks what a walk needs.
    """

    def __init__(self, path: str = "/proc/kcore", page_flags: str = "/proc/kpageflags") -> None:
        self._path = path
        self._fd = _open(path)
        try:
            self._headers = self._read_headers(self._fd)
            self.segments = tuple(
                Segment(h.p_vaddr, None if h.p_paddr == _NO_PADDR else h.p_paddr, h.p_memsz, h.p_offset)
                for h in self._headers
                if h.p_type == PT_LOAD
            )
            self._last = Segment(0, None, 0, 0)  # that was read from
            self.vmcoreinfo = self._read_vmcoreinfo()
            self.page_offset_base = direct_map_base(self.segments)
            ram = sorted(
                (s.pa, s.size, s.offset)
                for s in self.segments
                if s.is_ram and s.pa is not None and s.va - s.pa == self.page_offset_base
            )
            self._ram_start = np.array([pa for pa, _, _ in ram], dtype=np.uint64)
            self._ram_end = np.array([pa + size for pa, size, _ in ram], dtype=np.uint64)
            self._ram_offset = [offset - pa for pa, _, offset in ram]
            self.page_flags = PageFlags(page_flags)
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def ram(self) -> list[tuple[int, int]]:
        """Physical ranges [start, end) that the kernel calls RAM and that kcore offers."""
        return list(zip(self._ram_start.tolist(), self._ram_end.tolist(), strict=True))

    def close(self) -> None:
        self.page_flags.close()
        os.close(self._fd)

    def changed(self) -> bool:
        """Whether memory was hot-plugged or removed since the opening.

        The kernel renews the list of segments only when kcore is opened (``kcore_update_ram``), so it is opened anew.

        Raises:
            Undetermined: /proc/kcore cannot be opened any more.
        """
        fd = _open(self._path)
        try:
            return self._read_headers(fd) != self._headers
        finally:
            os.close(fd)

    @contextmanager
    def reader(self) -> Iterator[Callable[[int, memoryview], None]]:
        """A ``read_virtual`` for another thread: before 6.4 the kernel has one buffer for each open file.

        Raises:
            Undetermined: /proc/kcore cannot be opened any more.
        """
        fd = _open(self._path)
        try:
            yield partial(self.read_virtual, fd=fd)
        finally:
            os.close(fd)

    def read_virtual(self, va: int, buffer: memoryview, fd: int | None = None) -> None:
        """Fill ``buffer`` with the bytes at kernel virtual address ``va``; zeroes where they cannot be read.

        Args:
            fd: another open /proc/kcore to read by.

        Raises:
            Undetermined: no segment of kcore covers the range, or the read fails.
        """
        done = 0
        while done < len(buffer):
            at = va + done
            segment = self._last
            if not segment.va <= at < segment.va + segment.size:
                found = next((s for s in self.segments if s.va <= at < s.va + s.size), None)
                if found is None:
                    raise Undetermined(f"/proc/kcore does not offer {len(buffer) - done} bytes at {at:#x}")
                self._last = segment = found
            step = min(len(buffer) - done, segment.va + segment.size - at)
            self._pread(segment.offset + at - segment.va, buffer[done : done + step], fd)
            done += step

    def in_ram(self, pa: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Whether each page (by its physical address) lies in a RAM segment, so that it can be read."""
        index = np.searchsorted(self._ram_start, pa, side="right").astype(np.intp) - 1
        inside = index >= 0
        inside[inside] = pa[inside] + np.uint64(PAGE_SIZE) <= self._ram_end[index[inside]]
        return np.asarray(inside, dtype=np.bool_)

    def read_pages(self, pa: NDArray[np.uint64], out: NDArray[np.uint64]) -> None:
        """Read whole pages into the rows of ``out`` (shape n x 512), neighbours in one system call.

        Args:
            pa: n page-aligned physical addresses, all ``in_ram``, in ascending order.
            out: C-contiguous.

        Raises:
            Undetermined: the read fails.
        """
        if not len(pa):
            return
        view = out.reshape(-1).view(np.uint8).data
        segment = np.searchsorted(self._ram_start, pa, side="right") - 1
        breaks = np.flatnonzero((np.diff(pa) != PAGE_SIZE) | (np.diff(segment) != 0)) + 1
        for start, end in pairwise([0, *breaks.tolist(), len(pa)]):
            offset = self._ram_offset[int(segment[start])] + int(pa[start])
            self._pread(offset, view[start * PAGE_SIZE : end * PAGE_SIZE])

    def zero_filled(self, pa: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Whether kcore hands out zeroes for each of these pages, as their page flags say."""
        return self.page_flags.zero_filled(pa >> np.uint64(PAGE_SHIFT))

    def _pread(self, offset: int, buffer: memoryview, fd: int | None = None) -> None:
        done, fd = 0, self._fd if fd is None else fd
        while done < len(buffer):
            try:
                got = os.preadv(fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise Undetermined(f"reading {self._path} failed: {error.strerror}") from None
            if got == 0:
                raise Undetermined(f"{self._path} ended at offset {offset + done:#x}", "run the audit again")
            done += got

    def _read_headers(self, fd: int) -> list[Elf64_Phdr]:
        start = os.pread(fd, ELF64_EHDR.size, 0)
        if len(start) == ELF64_EHDR.size and start.startswith(ELFMAG):
            header = Elf64_Ehdr._make(ELF64_EHDR.unpack_from(start))
            start = os.pread(fd, min(header.e_phoff + header.e_phnum * ELF64_PHDR.size, _HEADER_LIMIT), 0)
        return parse_program_headers(start, self._path)

    def _read_vmcoreinfo(self) -> VmcoreInfo:
        for header in self._headers:
            if header.p_type == PT_NOTE:
                notes = os.pread(self._fd, min(header.p_filesz, _HEADER_LIMIT), header.p_offset)
                text = find_note(notes, b"VMCOREINFO")
                if text is not None:
                    return VmcoreInfo.parse(text.decode("ascii", "replace"))
        raise Undetermined(
            f"{self._path} has no VMCOREINFO note, so the kernel's page tables cannot be found",
            "audit a kernel built with CONFIG_VMCORE_INFO (CONFIG_CRASH_CORE before 6.9)",
        )


def _open(path: str) -> int:
    try:
        return open_path(path)
    except OSError as error:
        remedy = "run the audit as root with CAP_SYS_RAWIO"
        if error.errno == errno.EXDEV:
            remedy = "unmount what lies over it: nothing but the kernel's own file tells what is mapped"
        elif error.errno == errno.ENOENT:
            remedy = "audit on a kernel with CONFIG_PROC_KCORE; this one does not show its page tables"
        elif error.errno == errno.EPERM and _locked_down():
            remedy = "boot the host without kernel lockdown (lockdown=confidentiality forbids kcore)"
        raise Undetermined(f"cannot open {path}: {error.strerror}", remedy) from None


def _locked_down() -> bool:
    """Whether it is the kernel that forbids it (LOCKDOWN_KCORE), and not a capability that we lack (open_kcore)."""
    try:
        return "[none]" not in Path("/sys/kernel/security/lockdown").read_text(encoding="ascii")
    except OSError:  # securityfs is not mounted, as in most containers
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
        held = next((int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:")), 0)
        return bool(held >> _CAP_SYS_RAWIO & 1)
