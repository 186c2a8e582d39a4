"""A Linux kernel whose memory can be read: the host's by the primitive, a guest's by way of the host.

The same steps lead through both: where the image is, ``init_task``, the list of processes, an address space's page
tables. Each checks what it reads, so that a wrong offset loses the trail and does not lead astray.
"""

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offmap.attack.knowledge import Kernel
from offmap.audit.btf import Unknown
from offmap.audit.vmcoreinfo import START_KERNEL_MAP
from offmap.uapi.page import PAGE_SHIFT, PAGE_SIZE

IMAGE_ALIGN = 2 << 20  # CONFIG_PHYSICAL_ALIGN, at least
_PRESENT, _RW, _PSE = 1 << 0, 1 << 1, 1 << 7  # arch/x86/include/asm/pgtable_types.h
_PHYSICAL_MASK = (1 << 52) - PAGE_SIZE
_MOST_TASKS = 1 << 17
_COMM = 16  # TASK_COMM_LEN
_FILE_SYSTEM = 64  # bytes of a file system's name, at most
_LOWEST_KERNEL = 0xFF << 56
_FIVE_LEVELS_BELOW = 0xFFFF << 48


class Lost(Exception):
    """The trail is lost: what was read is not what should be there. Never the same as "ends"."""


@dataclass(frozen=True)
class Process:
    """A process: its ``struct task_struct``, PID and name, and its ``struct mm_struct`` (0: none)."""

    task: int
    pid: int
    name: str
    memory: int


@dataclass(frozen=True)
class Leaf:
    """What one entry of a process's page tables maps."""

    va: int
    pa: int
    bytes: int
    writable: bool


def walk_tables(entry_at: Callable[[int], int], table: int, levels: int, va: int, mask: int) -> Leaf | None:
    """What page tables map an address to; None if nothing.

    Args:
        entry_at: the entry at a physical address.
        table: physical address of the top table.
        mask: of the physical address in an entry.
    """
    for level in range(levels, 0, -1):
        shift = PAGE_SHIFT + 9 * (level - 1)
        entry = entry_at(table + (va >> shift & 511) * 8)
        if not entry & _PRESENT:
            return None
        if level == 1 or (level <= 3 and entry & _PSE):
            size = 1 << shift
            return Leaf(va & -size, entry & mask & -size, size, bool(entry & _RW))
        table = entry & mask
    return None


def _entries(level: int, base: int, start: int, end: int) -> tuple[int, int]:
    """Which entries of a table, whose first one maps ``base``, are for the addresses from ``start`` to ``end``."""
    shift = PAGE_SHIFT + 9 * (level - 1)
    return max(start - base, 0) >> shift, min((end - base - 1 >> shift) + 1, 512)


class Linux(ABC):
    """What is found out about a kernel, step by step.

    Args:
        kernel: what is known of its build.

    Attributes:
        slide: what KASLR moved the image by; set once the image is found.
        direct_map: ``page_offset_base``.
        levels: of its page tables.
        mask: of the physical address in an entry.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.slide = self.direct_map = 0
        self.levels = 4
        self.mask = _PHYSICAL_MASK

    @abstractmethod
    def read(self, va: int, size: int = 8) -> bytes:
        """Bytes at an address of this kernel's."""

    @abstractmethod
    def physical(self, pa: int, size: int = 8) -> bytes:
        """Bytes at what this kernel takes for a physical address; not across a page's end."""

    def pages(self, places: Sequence[int]) -> Iterator[bytes]:
        """The content of each of these pages, by what this kernel takes for a physical address, in order."""
        return (self.physical(pa, PAGE_SIZE) for pa in places)

    def symbol(self, name: str) -> int:
        """Its address in the running kernel."""
        return self.kernel.symbol(name) + self.slide

    def field(self, base: int, name: str, *members: str, size: int = 8) -> int:
        """A number in a structure."""
        return int.from_bytes(self.read(base + self.kernel.offset(name, *members), size), "little")

    def pointer(self, va: int, what: str) -> int:
        """A pointer into the kernel's half. Raises Lost: there is none."""
        found = int.from_bytes(self.read(va), "little")
        if found < _LOWEST_KERNEL:
            raise Lost(f"{what} is no pointer of the kernel's ({found:#x})")
        return found

    def pointer_in(self, base: int, name: str, *members: str) -> int:
        """A pointer in a structure; raises as ``pointer``."""
        return self.pointer(base + self.kernel.offset(name, *members), f"{name}.{'.'.join(members)}")

    def text(self, va: int, most: int) -> str:
        """A string that ends with a zero byte, read a word at a time."""
        found = b""
        while len(found) < most:
            part = self.read(va + len(found), 8 - (va + len(found)) % 8)
            found += part
            if 0 in part:
                break
        return found.split(b"\0", 1)[0][:most].decode("utf-8", "replace")

    def is_image(self, read: Callable[[int, int], bytes], place: int) -> bool:
        """Whether the kernel that is known begins at this place, by its banner: a word first, then all of it.

        Args:
            read: bytes at an address of the sort that `place` is.
        """
        banner = self.kernel.banner.encode()
        at = place + self.kernel.symbol("linux_banner") - self.kernel.symbol("_text")
        return read(at, 8) == banner[:8] and read(at, len(banner)) == banner

    def top_table_symbol(self) -> int:
        """Address of the kernel's own top page table, under the name that this build has for it."""
        try:
            return self.symbol("init_top_pgt")
        except Unknown:
            return self.symbol("swapper_pg_dir")

    def file_system(self, block: int) -> str:
        """What a ``struct super_block`` is of: ``ext4``, ``overlay``."""
        kind = self.pointer_in(block, "super_block", "s_type")
        return self.text(self.pointer_in(kind, "file_system_type", "name"), _FILE_SYSTEM)

    def find_direct_map(self) -> None:
        """Read where the direct map begins. Raises Lost: that cannot be."""
        base = int.from_bytes(self.read(self.symbol("page_offset_base")), "little")
        if base < _LOWEST_KERNEL or base % (1 << 30):
            raise Lost(f"page_offset_base cannot be {base:#x}")
        self.direct_map = base
        self.levels = 5 if base < _FIVE_LEVELS_BELOW else 4
        if "sme_me_mask" in self.kernel.symbols:
            encrypted = int.from_bytes(self.read(self.symbol("sme_me_mask")), "little")
            if encrypted & (encrypted - 1):
                raise Lost(f"sme_me_mask cannot be {encrypted:#x}")
            self.mask &= ~encrypted

    def check_init_task(self) -> int:
        """Address of ``init_task``. Raises Lost: it is not what it should be."""
        task = self.symbol("init_task")
        name = self.text(task + self.kernel.offset("task_struct", "comm"), _COMM)
        if not name.startswith("swapper") or self.field(task, "task_struct", "real_parent") != task:
            raise Lost("init_task is not where it should be")
        return task

    def processes(self) -> Iterator[Process]:
        """All of them, in the kernel's order; one that begins or ends meanwhile may be missing.

        Raises:
            Lost: the list is none.
        """
        first, offset = self.check_init_task(), self.kernel.offset("task_struct", "tasks")
        head = first + offset
        before, at = head, self.pointer(head, "init_task.tasks")
        for _ in range(_MOST_TASKS):
            if at == head:
                return
            following, previous = struct.unpack("<QQ", self.read(at, 16))
            if previous != before:
                raise Lost("the list of processes does not lead back: it is another, or being changed")
            task = at - offset
            pid = self.field(task, "task_struct", "pid", size=4)
            memory = self.field(task, "task_struct", "mm")
            name = self.text(task + self.kernel.offset("task_struct", "comm"), _COMM)
            yield Process(task, pid, name, memory)
            before, at = at, following
        raise Lost("the list of processes does not end")

    def top_table(self, memory: int) -> int:
        """Physical address of an address space's top page table. Raises Lost: it is not where page tables are."""
        table = self.field(memory, "mm_struct", "pgd") - self.direct_map
        if table <= 0 or table >> 46 or table % PAGE_SIZE:
            raise Lost("mm_struct.pgd does not lead to a page table")
        return table

    def leaf(self, table: int, va: int) -> Leaf | None:
        """What maps a user address; None if nothing does.

        Args:
            table: physical address of the top page table.
        """
        return self.leaf_of(table, self.levels, va)

    def leaf_of(self, table: int, levels: int, va: int) -> Leaf | None:
        """The same in tables of so many levels, KVM's nested ones too: bits 0, 1 and 7 and the address are the same."""
        return walk_tables(lambda at: int.from_bytes(self.physical(at), "little"), table, levels, va, self.mask)

    def leaves(self, table: int, start: int, end: int) -> Iterator[Leaf]:
        """What maps the user addresses from ``start`` to ``end``, in order."""
        for size, va, entry in self.leaf_entries(table, start, end):
            for each, raw in zip(va.tolist(), entry.tolist(), strict=True):
                yield Leaf(each, raw & self.mask & -size, size, bool(raw & _RW))

    def leaf_entries(
        self, table: int, start: int, end: int, levels: int | None = None
    ) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.uint64]]]:
        """The same, a table at a time: the size that each of its leaves maps, their addresses, their entries.

        Args:
            levels: of these tables; None: as many as the kernel's own have.
        """
        levels = levels or self.levels
        end = min(end, 1 << PAGE_SHIFT + 9 * levels - 1)
        if start < end:
            first, last = _entries(levels, 0, start, end)
            raw = self.physical(table + 8 * first, 8 * (last - first))
            yield from self._leaves(raw, levels, 0, start, end)

    def _leaves(
        self, raw: bytes, level: int, base: int, start: int, end: int
    ) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.uint64]]]:
        """What a table maps of these addresses.

        Args:
            raw: those of its entries that are for them.
            base: what its first entry maps.
        """
        shift, (first, _) = PAGE_SHIFT + 9 * (level - 1), _entries(level, base, start, end)
        entries: NDArray[np.uint64] = np.frombuffer(raw, dtype=np.uint64)
        index = np.flatnonzero(entries & np.uint64(_PRESENT))
        va = base + (first + index.astype(np.int64) << shift)
        if level == 1:
            yield 1 << shift, va, entries[index]
            return
        here = list(zip(va.tolist(), entries[index].tolist(), strict=True))
        large = [level <= 3 and bool(entry & _PSE) for _, entry in here]
        parts = [_entries(level - 1, at, start, end) for at, _ in here]
        whole = [part == (0, 512) and not leaf for part, leaf in zip(parts, large, strict=True)]
        tables = self.pages([entry & self.mask for (_, entry), all_of_it in zip(here, whole, strict=True) if all_of_it])
        for number, (at, entry) in enumerate(here):
            if large[number]:
                yield 1 << shift, va[number : number + 1], entries[index[number : number + 1]]
                continue
            low, high = parts[number]
            below = next(tables) if whole[number] else self.physical((entry & self.mask) + 8 * low, 8 * (high - low))
            yield from self._leaves(below, level - 1, at, start, end)

    def in_image(self, va: int) -> bool:
        """Whether it is an address of the kernel's image."""
        return START_KERNEL_MAP <= va < START_KERNEL_MAP + (1 << 30)
