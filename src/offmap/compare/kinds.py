"""The kinds of guest RAM that are compared: each backend under offmap's VMM, and some under other people's VMMs.

QEMU maps a file that is hidden memory. libvirt has QEMU make one in a pool. Firecracker takes none: on hidden memory it
runs under ``offmap wrap``.

The facts about a backend are in its class. This module pairs backends with VMMs and names the pairs.
"""

from dataclasses import dataclass
from enum import Enum
from functools import cache

from offmap.errors import OffmapError
from offmap.memory.backend import BACKENDS, Backend

BASELINE = "memfd"
"""Plain RAM. Each kind is compared with it, or with its VMM's own, under the same VMM in the same host."""


class Vmm(Enum):
    """What runs the guest."""

    OFFMAP = "offmap"
    QEMU = "qemu"  # as distributed
    LIBVIRT = "libvirt"  # as distributed, which runs QEMU without any right
    FIRECRACKER = "firecracker"  # as released

    @property
    def is_qemu(self) -> bool:
        """Whether QEMU runs the guest, by whomever it was started."""
        return self in {Vmm.QEMU, Vmm.LIBVIRT}

    @property
    def baseline(self) -> str:
        """The plain RAM that a kind under this VMM is compared with."""
        return "anon" if self is Vmm.FIRECRACKER else BASELINE


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
        return self.ram if self.vmm is Vmm.OFFMAP else f"{self.vmm.value}-{self.ram}"

    @property
    def backend(self) -> type[Backend]:
        return BACKENDS[self.ram]

    @property
    def baseline(self) -> "Kind":
        """Plain RAM under the same VMM: the comparison is between kinds of RAM, not VMMs."""
        return Kind(self.vmm.baseline, self.vmm)

    @property
    def is_wrapped(self) -> bool:
        """Whether its VMM is started by ``offmap wrap``."""
        return self.vmm is Vmm.FIRECRACKER and self.backend.hides

    def clock_refusal(self, kvm_clock: str) -> str:
        """Why its VMM's guests cannot have this choice of kvm-clock (on, off, auto); empty if they can.

        offmap's own VMM decides by the host's kernel, and is asked there.
        """
        if self.vmm is not Vmm.FIRECRACKER:
            return ""
        if kvm_clock == "on" and self.is_wrapped:
            return "offmap wrap takes kvm-clock out of what it offers"
        return "it always offers kvm-clock" if kvm_clock == "off" and not self.is_wrapped else ""


def kind_of(name: str) -> Kind:
    """The kind of that name. Raises OffmapError: there is none."""
    foreign = next((vmm for vmm in Vmm if name.startswith(f"{vmm.value}-")), None)
    kind = Kind(name.removeprefix(f"{foreign.value}-"), foreign) if foreign else Kind(name)
    if kind.ram not in BACKENDS or (kind.vmm in {Vmm.FIRECRACKER, Vmm.LIBVIRT} and name not in kind_names()):
        raise OffmapError(f"{name!r} is no kind of guest RAM", f"choose from {', '.join(kind_names())}")
    return kind


@cache
def kind_names() -> tuple[str, ...]:
    """All that are compared, in the order of the report: the plain ones first, other people's VMMs last."""
    compared = {name: backend for name, backend in BACKENDS.items() if backend.compared}
    files = [name for name, backend in compared.items() if backend.file]
    foreign = [*(Kind(name, Vmm.QEMU) for name in files), Kind("pool", Vmm.LIBVIRT)]
    foreign += [Kind(name, Vmm.FIRECRACKER) for name in (Vmm.FIRECRACKER.baseline, *files)]
    return (*compared, *(kind.name for kind in foreign))
