"""The host, as the attacker sees it: by the primitive alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offmap.attack.knowledge import Kernel
from offmap.attack.linux import IMAGE_ALIGN, Linux, Lost, Process
from offmap.attack.primitive import NotMapped, Primitive
from offmap.audit.mappings import KernelMappings
from offmap.audit.tops import TOP_ENTRY, Tops
from offmap.audit.vmcoreinfo import START_KERNEL_MAP
from offmap.audit.walk import Walker
from offmap.uapi.page import PAGE_SIZE

_IMAGE_SPACE = 1 << 30  # KERNEL_IMAGE_SIZE with KASLR
_MOST_FILES = 1 << 16
_NAME = 64


@dataclass(frozen=True)
class File:
    """An open file of a process: address of its ``struct file``, and its name without the folder."""

    file: int
    name: str


class Host(Linux):
    """Reads the host kernel.

    Args:
        primitive: how.
        kernel: what is known of the host's kernel.
    """

    def __init__(self, primitive: Primitive, kernel: Kernel) -> None:
        super().__init__(kernel)
        self._primitive = primitive

    def read(self, va: int, size: int = 8) -> bytes:
        return self._primitive.read(va, size)

    def physical(self, pa: int, size: int = 8) -> bytes:
        return self._primitive.read(self.direct_map + pa, size)

    def pages(self, places: Sequence[int]) -> Iterator[bytes]:
        for pa, data in zip(places, self.mapped_pages(places), strict=True):
            if data is None:
                raise NotMapped(self.direct_map + pa)
            yield data

    def mapped_pages(self, places: Sequence[int]) -> Iterator[bytes | None]:
        """The content of each of these pages, in order; None of one that the direct map does not have."""
        return self._primitive.read_pages([self.direct_map + pa for pa in places])

    def read_user(self, process: Process, va: int, size: int = 8) -> bytes:
        """Bytes of a process's own, within one page; raises NotMapped where the primitive may not read them."""
        return self._primitive.read_user(process.pid, va, size)

    def find_image(self, base: int | None) -> int:
        """Where the image is: ``_text``. Searched for among all places that KASLR may choose, unless it is given.

        Raises:
            Lost: it is nowhere.
        """
        places = range(START_KERNEL_MAP, START_KERNEL_MAP + _IMAGE_SPACE, IMAGE_ALIGN) if base is None else (base,)
        for place in places:
            try:
                if self.is_image(self.read, place):
                    self.slide = place - self.kernel.symbol("_text")
                    return place
            except NotMapped:
                continue
        raise Lost("the host's kernel is not the one that is known, or not where it should be")

    def process(self, pid: int) -> Process:
        """The process with this PID. Raises Lost: there is none."""
        for each in self.processes():
            if each.pid == pid:
                return each
        raise Lost(f"the host has no process {pid}")

    def files(self, process: Process) -> Iterator[File]:
        """Its open files."""
        files = self.pointer_in(process.task, "task_struct", "files")
        table = self.pointer_in(files, "files_struct", "fdt")
        size = self.field(table, "fdtable", "max_fds", size=4)
        if not 0 < size <= _MOST_FILES:
            raise Lost(f"fdtable.max_fds cannot be {size}")
        array = self.pointer_in(table, "fdtable", "fd")
        for number in range(size):
            file = int.from_bytes(self.read(array + 8 * number), "little")
            if not file:
                continue
            entry = self.pointer_in(file, "file", "f_path", "dentry")
            name = self.pointer_in(entry, "dentry", "d_name", "name")
            yield File(file, self.text(name, _NAME))

    def cached_files(self, process: Process) -> Iterator[tuple[str, int]]:
        """Files that a process has open and that the page cache has pages of: name, ``struct address_space``.

        Raises:
            Lost: a file lies on another, and which that is cannot be told.
        """
        seen = set()
        for file in self.files(process):
            mapping = self.pointer_in(self._real(file), "file", "f_mapping")
            pages = self.field(mapping, "address_space", "nrpages")
            if pages and mapping not in seen:
                seen.add(mapping)
                yield file.name, mapping

    def _real(self, file: File) -> int:
        """The file that has the pages: below an overlay it is another one (``fs/overlayfs/file.c``)."""
        inode = self.pointer_in(file.file, "file", "f_inode")
        if self.file_system(self.pointer_in(inode, "inode", "i_sb")) != "overlay":
            return file.file
        # Until 6.12 private_data is the real file, and since then it begins with a pointer to it.
        real = self.field(file.file, "file", "private_data")
        for _ in range(2):
            if self._is_file(real):
                return real
            real = int.from_bytes(self.read(real), "little") if real else 0
        raise Lost(f"{file.name} is on an overlay, and the file below it is not where it should be")

    def _is_file(self, at: int) -> bool:
        try:
            inode = self.field(at, "file", "f_inode")
            mapping = self.field(at, "file", "f_mapping")
            return self.field(mapping, "address_space", "host") == inode != 0
        except NotMapped:
            return False

    def mappings(self, other: int | None = None) -> KernelMappings:
        """All that the kernel half of the page tables maps, read through the primitive.

        Args:
            other: physical address of another top table whose kernel half is walked too: a process has a few mappings
                of its own there (its LDT, with page-table isolation).

        Raises:
            Lost: the tables cannot be found.
        """
        root = self.top_table_symbol()
        phys_base = int.from_bytes(self.read(self.symbol("phys_base")), "little")
        root_pa = (root - START_KERNEL_MAP + phys_base) % (1 << 64)
        if self.read(root, 8 * 512)[2048:] != self.physical(root_pa, 8 * 512)[2048:]:
            raise Lost("the kernel's top page table is not where phys_base says")
        encrypted = ((1 << 52) - PAGE_SIZE) & ~self.mask
        tables = _Tables(self)
        walker = Walker(
            tables, root_pa, self.levels, self.direct_map, encrypted, lambda: self._kernel_half(other, root_pa)
        )
        walker.walk()
        return walker.mappings()

    def _kernel_half(self, other: int | None, root_pa: int) -> Tops:
        """What a top table has in its kernel half beside the kernel's own."""
        if other is None:
            return Tops.none()
        its, own = (np.frombuffer(self.physical(table, PAGE_SIZE), dtype=np.uint64)[256:] for table in (other, root_pa))
        differs = np.flatnonzero((its != own) & (its != 0))
        found = np.empty(len(differs), dtype=TOP_ENTRY)
        found["index"], found["entry"] = differs + 256, its[differs]
        return Tops(found, {"the VMM's": 1})


class _Tables:
    """Page tables by the primitive (``walk.PhysicalReader``). One that it cannot read loses the trail."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def in_ram(self, pa: NDArray[np.uint64]) -> NDArray[np.bool_]:
        return np.ones(len(pa), dtype=np.bool_)

    def read_pages(self, pa: NDArray[np.uint64], out: NDArray[np.uint64]) -> None:
        for row, data in enumerate(self._host.pages(pa.tolist())):
            out[row] = np.frombuffer(data, dtype=np.uint64)

    def zero_filled(self, pa: NDArray[np.uint64]) -> NDArray[np.bool_]:
        return np.zeros(len(pa), dtype=np.bool_)  # the primitive makes nothing up
