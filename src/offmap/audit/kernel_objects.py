"""What the kernel's own structures say of a page: the file it caches, the slab it is of, the stack it is a part of.

Read through /proc/kcore with the offsets that BTF gives. The kernel goes on working meanwhile, so every pointer is
checked to lead where the kernel keeps such things, loops are bounded, and what does not add up is no answer. Names
only: no verdict rests on them.
"""

import os
from collections.abc import Iterator, Set
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from offmap.audit.btf import Btf, Unknown
from offmap.audit.kcore import Kcore
from offmap.audit.procfs import read_path
from offmap.audit.regions import DIRECT_MAP, KERNEL_TEXT, MODULES, VMEMMAP, Layout
from offmap.errors import Undetermined
from offmap.uapi.page import PAGE_SIZE

_KALLSYMS = "/proc/kallsyms"
_MODULES = Path("/sys/module")
_MAPPING_FLAGS = 3  # PAGE_MAPPING_FLAGS (FOLIO_MAPPING_FLAGS): anonymous, KSM or movable memory, no file's
_MOST_DEEP = 256  # folders above a file
_MOST_TASKS = 1 << 17
_TASK_COMM_LEN = 16
_NAME_LENGTH = 256


@dataclass(frozen=True)
class CachedFile:
    """The file that a page of the page cache is of.

    Attributes:
        path: as this process sees it where that can be told, else the name within its file system.
        offset: of the page in the file, in bytes.
        device, inode: as stat(2) has them.
        file_system: ``ext4``, ``tmpfs``, …
    """

    path: str
    offset: int
    device: tuple[int, int]
    inode: int
    file_system: str

    @property
    def name(self) -> str:
        """Path and file system, for people."""
        return f"{self.path} ({self.file_system})" if self.file_system else self.path


@dataclass(frozen=True)
class Task:
    """A thread and where its kernel stack is."""

    pid: int
    name: str
    stack: int


class KernelObjects:
    """Looks things up in the running kernel.

    Raises:
        Unknown: this kernel has no BTF, or lacks a structure that everything here rests on.
    """

    # Where structures are: each begins and ends in regions of one of these sets.
    _readable: tuple[Set[str], ...] = ({DIRECT_MAP, KERNEL_TEXT, MODULES, VMEMMAP},)

    def __init__(self, kcore: Kcore, layout: Layout, btf: Btf) -> None:
        self._kcore, self._layout, self._btf = kcore, layout, btf
        self._page_size = btf.size("page")

    def file_of(self, head: int, pfn: int) -> CachedFile | None:
        """The file that page ``pfn`` of the folio that begins at frame ``head`` caches; None if it cannot be told."""
        with suppress(Unknown):
            page = self._layout.vmemmap + head * self._page_size
            mapping = self._field(page, "folio", "mapping")
            if not mapping or mapping & _MAPPING_FLAGS:
                return None
            inode = self._field(mapping, "address_space", "host")
            if not inode or self._field(inode, "inode", "i_mapping") != mapping:
                return None
            index = self._field(page, "folio", "index")
            block = self._field(inode, "inode", "i_sb")
            number = self._field(inode, "inode", "i_ino")
            kind = self._string(self._field(self._field(block, "super_block", "s_type"), "file_system_type", "name"))
            dev = self._field(block, "super_block", "s_dev", size=4)
            device = dev >> 20, dev & 0xF_FFFF  # include/linux/kdev_t.h: MINORBITS
            path = self._path(inode, device) or f"inode {number}"
            return CachedFile(path, (index + pfn - head) * PAGE_SIZE, device, number, kind)
        return None

    def slab_of(self, head: int) -> str:
        """Name of the slab cache that a page is of (``kmalloc-256``); empty if it cannot be told."""
        with suppress(Unknown):
            cache = self._field(self._layout.vmemmap + head * self._page_size, "slab", "slab_cache")
            return self._string(self._field(cache, "kmem_cache", "name"))
        return ""

    def unused(self, pfn: int) -> bool:
        """Whether nobody holds a reference to this page: it is free, though on a list of one processor's own."""
        with suppress(Unknown):
            return self._field(self._layout.vmemmap + pfn * self._page_size, "page", "_refcount", size=4) == 0
        return False

    def page_table_of(self, pid: int) -> int:
        """Kernel address of a process's top-level page table; 0 if it cannot be found."""
        with suppress(Unknown):
            memory = self._field(self._task(pid), "task_struct", "mm")
            return self._field(memory, "mm_struct", "pgd") if memory else 0
        return 0

    def _task(self, pid: int) -> int:
        """Address of a process's ``struct task_struct``."""
        for task in self._leaders():
            if self._field(task, "task_struct", "pid", size=4) == pid:
                return task
        raise Unknown(f"the kernel has no process {pid}")

    def tasks(self) -> Iterator[Task]:
        """All threads, as far as they can be followed. Raises Unknown: the first one cannot be found."""
        seen = 0
        for leader in self._leaders():
            group = self._field(leader, "task_struct", "signal") + self._btf.offset("signal_struct", "thread_head")
            node = self._btf.offset("task_struct", "thread_node")
            at = self._pointer(group)
            while at != group and seen < _MOST_TASKS:
                seen += 1
                task = at - node
                pid = self._field(task, "task_struct", "pid", size=4)
                name = self._string(task + self._btf.offset("task_struct", "comm"), _TASK_COMM_LEN)
                yield Task(pid, name, self._field(task, "task_struct", "stack"))
                at = self._pointer(at)

    def _leaders(self) -> Iterator[int]:
        """The first thread of each process."""
        offset, first = self._btf.offset("task_struct", "tasks"), symbol("init_task")
        task = first
        for _ in range(_MOST_TASKS):
            yield task
            task = self._pointer(task + offset) - offset
            if task == first:
                return

    def _path(self, inode: int, device: tuple[int, int]) -> str:
        entry = self._field(inode, "inode", "i_dentry")
        if not entry:
            return ""
        try:
            alias = self._btf.offset("dentry", "d_u", "d_alias")
        except Unknown:
            alias = self._btf.offset("dentry", "d_alias")  # 7.x has no name for the union
        dentry = entry - alias
        parts: list[str] = []
        for _ in range(_MOST_DEEP):
            name = self._string(self._field(dentry, "dentry", "d_name", "name"))
            parent = self._field(dentry, "dentry", "d_parent")
            if parent == dentry:
                if name != "/":
                    return "/".join([name, *reversed(parts)])  # memfd, pipes: no folder at all
                return _mounted("/" + "/".join(reversed(parts)), device)
            parts.append(name)
            dentry = parent
        return ""

    def _field(self, base: int, name: str, *members: str, size: int = 8) -> int:
        return self._number(base + self._btf.offset(name, *members), size)

    def _pointer(self, va: int) -> int:
        return self._number(va, 8)

    def _number(self, va: int, size: int) -> int:
        return int.from_bytes(self._read(va, size), "little")

    def _string(self, va: int, most: int = _NAME_LENGTH) -> str:
        # Never across a page's end: what follows may be another thing, or nothing.
        raw = self._read(va, min(most, PAGE_SIZE - va % PAGE_SIZE))
        return raw.split(b"\0", 1)[0].decode("utf-8", "replace")

    def _read(self, va: int, size: int) -> bytes:
        regions = {self._layout.name(va), self._layout.name(va + size - 1)}
        if not any(regions <= each for each in self._readable):
            raise Unknown(f"{va:#x} is not where the kernel keeps its structures")
        buffer = bytearray(size)
        try:
            self._kcore.read_virtual(va, memoryview(buffer))
        except Undetermined as error:
            raise Unknown(str(error)) from None
        return bytes(buffer)


# What is asked for sooner or later: looked for at once, as the file is long and the kernel writes it anew each time.
_OFTEN = ("init_task", "init_pid_ns", "pgd_list", "poking_mm", "text_poke_mm", "efi_mm", "real_mode_header", "srcu")
_known: dict[str, int] = {}


def module_symbol(name: str, module: str) -> int:
    """Address of a symbol of a module, or of the kernel if that is built in; raises as ``symbol``."""
    try:
        # It moves only where the module is loaded anew.
        where = (_MODULES / module / "sections/.data").read_text(encoding="ascii")
    except OSError:
        where = ""
    return _module_symbol(name, module, where)


@lru_cache
def _module_symbol(name: str, module: str, _where: str) -> int:
    return _find_symbol(name, f"\t[{module}]") or symbol(name)


def symbol(name: str) -> int:
    """Address of a symbol of the kernel's own, no module's: it stays while this process lives, so it is read once.

    Raises:
        Unknown: /proc/kallsyms does not tell. That is not remembered: it may tell later (``kernel.kptr_restrict``).
    """
    address = _known.get(name) or _find_symbol(name, "")
    if address:
        return address
    raise Unknown(f"{_KALLSYMS} does not tell where {name} is")


def _find_symbol(name: str, module: str) -> int:
    """Address of a symbol that this stands behind in /proc/kallsyms; 0 if it is not told."""
    try:
        text = b"\n" + read_path(_KALLSYMS)
    except OSError as error:
        raise Unknown(f"cannot read {_KALLSYMS}: {error.strerror}") from None
    found = {name + module: 0}
    for each in (name + module, *_OFTEN):
        # A module's, which may move, has a tab and the module's name behind it (kernel/kallsyms.c, s_show).
        line = f" {each}\n".encode()
        at = text.find(line)
        if at >= 0 and at == text.rfind(line):  # of two that are static it is not told which is which
            start = text.rindex(b"\n", 0, at)
            found[each] = int(text[start:at].split(maxsplit=1)[0], 16)
    _known.update((each, address) for each, address in found.items() if address and "\t" not in each)
    return found[name + module]


def _mounted(path: str, device: tuple[int, int]) -> str:
    """A path within a file system as we see it; the path itself where that is not mounted."""
    best = ("", "")
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            fields = line.split()
            if len(fields) > 4 and fields[2] == f"{device[0]}:{device[1]}":
                root = fields[3].rstrip("/")
                if (path == root or path.startswith(root + "/")) and (not best[1] or len(root) > len(best[0])):
                    best = (root, fields[4])
    if not best[1]:
        return path
    return os.path.normpath(best[1] + "/" + path[len(best[0]) :]).replace("//", "/")
