"""The kinds of guest RAM, by the name and options that ``--memory NAME[,option=value…]`` gives.

What a kind is stands on its class and nowhere else. To add one: its module, its row in `BACKENDS`, its row in
docs/backends.md.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module

from offmap.errors import BackendRefused, KernelError, OffmapError
from offmap.hidden_files import SEE_LOG
from offmap.kvm import Vm
from offmap.memory.backing import Backing
from offmap.memory.guest import GuestMemory
from offmap.options import Options
from offmap.typed import ClassVar, Protocol, Self
from offmap.units import format_size

ASK_FOR_LESS = "ask for less, or free memory"


class Keeper(Protocol):
    """A process that outlives this one, whatever ends it."""

    def keep_range(self, lock: int, start: int, size: int) -> None:
        """Take the locked file of a range of physical memory. Once this process has ended, it zeroes and unlocks it."""

    def zeroed(self) -> None:
        """The range is zeroed already."""


class Backend(ABC):
    """Where guest RAM comes from.

    Attributes:
        name: as ``--memory`` spells it.
        usage: its options, as ``--memory`` takes them after the name; empty where it has none.
        hides: it promises RAM that the host kernel does not map. The audit checks the promise.
        may_be_aliased: its pages have a struct page: they come from Linux's allocator, and the kernel may map them
            beside the direct map (freed parts of its image). Such RAM is audited before the guest gets it.
        discards: single pages can go back to the host while the guest runs.
        needs_module: offmap.ko makes it.
        since: the first Linux release, as (major, minor), whose KVM runs guests from it; None: no release, only a
            patched kernel.
        linux_owned: the memory is the host kernel's before the guest, and again after it. Else it is never Linux's.
        page_by_page: the host prepares each 4 KiB page by itself, which takes several times as long as a memfd.
        file: a file that another VMM can map as its guest's RAM; empty where there is none.
        keeper: another process: it holds what must outlive this one, or what this one must not hold; None: nobody.
        compared: `offmap compare` can set it up by itself.
        progress: called with the share of the RAM that is ready, from 0 to 1, by kinds that take long to get.
    """

    name: ClassVar[str]
    usage: ClassVar[str] = ""
    hides: ClassVar[bool] = False
    may_be_aliased: ClassVar[bool] = True
    discards: ClassVar[bool] = False
    needs_module: ClassVar[bool] = False
    since: ClassVar[tuple[int, int] | None] = (0, 0)
    linux_owned: ClassVar[bool] = True
    page_by_page: ClassVar[bool] = False
    file: ClassVar[str] = ""
    compared: ClassVar[bool] = True
    progress: Callable[[float], None] = staticmethod(lambda _share: None)
    keeper: "Keeper | None" = None

    @classmethod
    def from_options(cls, options: Options) -> Self:
        """Build it from its options, all of which it takes. Raises OffmapError: one cannot have that value."""
        return cls()

    @classmethod
    def in_release(cls, release: tuple[int, int]) -> bool:
        """Whether Linux `release` (major, minor), as released, runs guests from it."""
        return cls.since is not None and release >= cls.since

    @abstractmethod
    def allocate(self, vm: Vm, size: int) -> list[Backing]:
        """`size` bytes (whole pages) of zeroed memory that `vm` can run from, mapped into this process.

        Raises:
            BackendRefused: this host cannot give it, with the reason and the remedy.
        """

    def guest_memory(self, vm: Vm, size: int) -> GuestMemory:
        """`size` bytes of guest RAM."""
        return GuestMemory(self.allocate(vm, size))

    def placed_from(self) -> list[str]:
        """What `offmap wrap` places under other people's VMMs: the kind of a ``wrap.source``, and where it is from.

        Raises:
            OffmapError: it cannot be placed.
        """
        raise OffmapError(
            f"{self.name} cannot be placed under a VMM", "use --memory pool or --memory unplugged, which are files"
        )


class _Registry(Mapping[str, type[Backend]]):
    """Backends by name. A class is imported when it is asked for, which keeps `offmap run` quick to start.

    Args:
        classes: each as ``module:class``, by the backend's name.
    """

    def __init__(self, classes: Mapping[str, str]) -> None:
        self._classes = classes

    def __getitem__(self, name: str) -> type[Backend]:
        module, _, class_name = self._classes[name].partition(":")
        backend: type[Backend] = getattr(import_module(module), class_name)
        return backend

    def __contains__(self, name: object) -> bool:
        return name in self._classes

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def __len__(self) -> int:
        return len(self._classes)


BACKENDS: Mapping[str, type[Backend]] = _Registry(
    {
        "anon": "offmap.memory.anon:Anon",
        "memfd": "offmap.memory.memfd:Memfd",
        "hugetlb": "offmap.memory.hugetlb:Hugetlb",
        "reserved": "offmap.memory.reserved:Reserved",
        "unplugged": "offmap.memory.unplugged:Unplugged",
        "pool": "offmap.memory.pool:Pool",
        "secretmem": "offmap.memory.secretmem:Secretmem",
        "secretmem-bridge": "offmap.memory.secretmem_bridge:SecretmemBridge",
        "guest_memfd": "offmap.memory.guest_memfd:GuestMemfd",
        "guest_memfd-unmapped": "offmap.memory.guest_memfd_unmapped:GuestMemfdUnmapped",
    }
)
"""Every backend, in the order of tables and reports."""


def parse_backend(text: str) -> Backend:
    """The backend that `text` (``NAME[,option=value…]``) asks for. Raises OffmapError: an unknown name or option."""
    name = text.partition(",")[0]
    if name not in BACKENDS:
        raise OffmapError(f"there is no memory backend {name!r}", f"choose one of {', '.join(BACKENDS)}")
    backend = BACKENDS[name]
    usage = f"its option is {backend.usage}" if backend.usage else f"write {name} alone, which has no options"
    with Options(text, f"--memory {name}", usage, leads=True) as options:
        return backend.from_options(options)


@contextmanager
def refused(remedy: str | Mapping[int, str] = "") -> Iterator[None]:
    """Make a failed system call within a refusal of the backend.

    Args:
        remedy: what to do about it, for any error or by its errno; empty: what the error says itself.

    Raises:
        BackendRefused: in place of KernelError.
    """
    try:
        yield
    except KernelError as error:
        if not isinstance(remedy, str):
            remedy = remedy.get(error.errno, SEE_LOG)
        raise BackendRefused(error.what, error.why, remedy or error.remedy) from None


def check_host_has(size: int) -> None:
    """Refuse `size` bytes that this host's RAM could never hold (the kernel overcommits, and would kill us later).

    Raises:
        BackendRefused: with both figures.
    """
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > total:
        raise BackendRefused(
            f"this host cannot give {format_size(size)} of RAM",
            f"it has {format_size(total)}",
            "ask for less with --memory-size",
        )
