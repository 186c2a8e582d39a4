"""The ways to get guest RAM, by name and options, as ``--memory NAME[,option=value…]`` spells them."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import ClassVar, Self

from offmap.errors import BackendRefused, OffmapError
from offmap.kvm import Vm
from offmap.memory.backing import Backing
from offmap.memory.guest import GuestMemory
from offmap.units import format_size

__all__ = ["BACKENDS", "Backend", "parse_backend"]

BACKENDS: Mapping[str, str] = {
    # name: the class, in the module of that name (with _ for -)
    "anon": "Anon",
    "memfd": "Memfd",
    "hugetlb": "Hugetlb",
    "reserved": "Reserved",
    "unplugged": "Unplugged",
    "secretmem": "Secretmem",
    "secretmem-bridge": "SecretmemBridge",
    "guest_memfd": "GuestMemfd",
    "guest_memfd-unmapped": "GuestMemfdUnmapped",
}


class Backend(ABC):
    """Where guest RAM comes from.

    Attributes:
        name: as ``--memory`` spells it.
        hides: whether it promises RAM that the host kernel does not map. The promise is the audit's to check.
        may_be_aliased: whether its pages have a struct page: they came from Linux's allocator, which may have kernel
            mappings of them beside the direct map (freed parts of the kernel image). Such RAM is audited before the
            guest gets it.
        progress: called with the share of the RAM that is ready, from 0 to 1, by kinds that take long to get.
    """

    name: ClassVar[str]
    hides: ClassVar[bool] = False
    may_be_aliased: ClassVar[bool] = True
    progress: Callable[[float], None] = staticmethod(lambda _share: None)

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """Build it from its ``option=value`` pairs.

        Raises:
            OffmapError: it has no such option, or not with that value.
        """
        if options:
            raise OffmapError(f"memory backend {cls.name} has no option {next(iter(options))!r}")
        return cls()

    @abstractmethod
    def allocate(self, vm: Vm, size: int) -> list[Backing]:
        """`size` bytes (whole pages) of zeroed memory that `vm` can run from, mapped into this process.

        Raises:
            BackendRefused: this host cannot give it, with the reason and the remedy.
        """

    def guest_memory(self, vm: Vm, size: int) -> GuestMemory:
        """`size` bytes of guest RAM."""
        return GuestMemory(self.allocate(vm, size))


def parse_backend(text: str) -> Backend:
    """The backend that `text` (``NAME[,option=value…]``) asks for.

    Raises:
        OffmapError: an unknown name or option.
    """
    name, *pairs = text.split(",")
    class_name = BACKENDS.get(name)
    if class_name is None:
        raise OffmapError(f"there is no memory backend {name!r}", f"choose one of {', '.join(BACKENDS)}")
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise OffmapError(f"{pair!r} is not an option of a memory backend", "write option=value")
        options[key] = value
    backend: type[Backend] = getattr(import_module(f"offmap.memory.{name.replace('-', '_')}"), class_name)
    return backend.from_options(options)


def check_host_has(size: int) -> None:
    """Refuse `size` bytes that this host's RAM could never hold (the kernel overcommits, and would kill us later).

    Raises:
        BackendRefused: with both figures.
    """
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > total:
        raise BackendRefused(
            f"the guest asks for {format_size(size)} of RAM and this host has {format_size(total)}",
            "ask for less with --memory-size",
        )
