"""The kinds of guest RAM that are compared: each backend under offmap's VMM, and under QEMU those that QEMU can map.

The facts about a backend are in its class. This module pairs backends with VMMs and names the pairs.
"""

from dataclasses import dataclass
from enum import Enum
from functools import cache

from offmap.errors import OffmapError
from offmap.memory.backend import BACKENDS, Backend

BASELINE = "memfd"
"""Plain RAM. Each kind is compared with it under the same VMM in the same host."""

_QEMU = "qemu-"


class Vmm(Enum):
    """What runs the guest."""

    OFFMAP = "offmap"
    QEMU = "qemu"  # as distributed


@dataclass(frozen=True, slots=True)
class Kind:
    """A backend under a VMM.

    Attributes:
        ram: the backend's name.
    """

    ram: str
    vmm: Vmm = Vmm.OFFMAP

    @property
    def name(self) -> str:
        """The name on the axis of the matrix: ``unplugged``, ``qemu-unplugged``."""
        return f"{_QEMU if self.vmm is Vmm.QEMU else ''}{self.ram}"

    @property
    def backend(self) -> type[Backend]:
        return BACKENDS[self.ram]

    @property
    def baseline(self) -> "Kind":
        """Plain RAM under the same VMM: the comparison is between kinds of RAM, not VMMs."""
        return Kind(BASELINE, self.vmm)


def kind_of(name: str) -> Kind:
    """The kind of that name.

    Raises:
        OffmapError: there is none.
    """
    kind = Kind(name.removeprefix(_QEMU), Vmm.QEMU if name.startswith(_QEMU) else Vmm.OFFMAP)
    if kind.ram not in BACKENDS:
        raise OffmapError(f"{name!r} is no kind of guest RAM", f"choose from {', '.join(kind_names())}")
    return kind


@cache
def kind_names() -> tuple[str, ...]:
    """All that are compared, in the order of the report: the plain ones first, QEMU's last."""
    compared = {name: backend for name, backend in BACKENDS.items() if backend.compared}
    return (*compared, *(f"{_QEMU}{name}" for name, backend in compared.items() if backend.file))
