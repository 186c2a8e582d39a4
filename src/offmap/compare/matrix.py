"""The matrix of the comparison: its cells, and the order in which they are run.

A host kernel refuses some combinations whatever the guest. Those are kept once: the refusal is the result.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

from offmap.compare.kinds import Vmm, kind_names, kind_of
from offmap.compare.spec import KVM_CLOCKS, CellSpec
from offmap.errors import OffmapError

MAX_VCPUS = 64  # more would take a lab host too long, and would compare processors, not memory
_RELEASED = re.compile(r"debian:(\d+)\.(\d+)")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Axes:
    """The values of each axis; cells are their combinations."""

    backends: tuple[str, ...] = kind_names()
    host_kernels: tuple[str, ...] = ("debian:6.12",)
    guest_kernels: tuple[str, ...] = ("debian:6.12",)
    vcpus: tuple[int, ...] = (1,)
    kvm_clocks: tuple[str, ...] = ("auto",)

    def __post_init__(self) -> None:
        for name in self.backends:
            if name not in kind_names():
                raise OffmapError(f"{name!r} is no kind of guest RAM", f"choose from {', '.join(kind_names())}")
        for clock in self.kvm_clocks:
            if clock not in KVM_CLOCKS:
                raise OffmapError(f"kvm-clock cannot be {clock!r}", f"choose from {', '.join(KVM_CLOCKS)}")
        for count in self.vcpus:
            if not 1 <= count <= MAX_VCPUS:
                raise OffmapError(f"a guest cannot have {count} vCPUs here", f"give 1 to {MAX_VCPUS}")

    def narrowed(
        self,
        backends: Sequence[str] | None = None,
        host_kernels: Sequence[str] | None = None,
        guest_kernels: Sequence[str] | None = None,
        vcpus: Sequence[int] | None = None,
        kvm_clocks: Sequence[str] | None = None,
    ) -> "Axes":
        """These axes, with the given ones replaced. Duplicate values count once.

        Raises:
            OffmapError: a value that the axis cannot have.
        """

        def chosen(values: Sequence[T] | None, own: tuple[T, ...]) -> tuple[T, ...]:
            return tuple(dict.fromkeys(values)) if values else own

        return Axes(
            chosen(backends, self.backends),
            chosen(host_kernels, self.host_kernels),
            chosen(guest_kernels, self.guest_kernels),
            chosen(vcpus, self.vcpus),
            chosen(kvm_clocks, self.kvm_clocks),
        )


DEFAULT_AXES = Axes()
FULL_AXES = Axes(
    host_kernels=("debian:6.12", "debian:7.3", "patched:7.3", "debian:6.1"),
    guest_kernels=("debian:6.12", "debian:6.1", "debian:7.3"),
    vcpus=(1, 2),
    kvm_clocks=("off", "on"),
)


def cells_of(axes: Axes) -> tuple[CellSpec, ...]:
    """All combinations that make sense. Those that tell most come first, for runs that are stopped.

    The guest kernel varies slowest, then vCPUs, kvm-clock, the host kernel and the backend.
    """
    return tuple(_sensible(axes))


def _sensible(axes: Axes) -> Iterator[CellSpec]:
    refused: set[tuple[str, str, str]] = set()
    for guest, vcpus, clock, host, backend in product(
        axes.guest_kernels, axes.vcpus, axes.kvm_clocks, axes.host_kernels, axes.backends
    ):
        spec = CellSpec(backend, host, guest, vcpus, clock)
        if why := known_refusal(spec):
            if (why, backend, host) in refused:
                continue  # whatever the guest, the refusal is the same
            refused.add((why, backend, host))
        yield spec


def known_refusal(spec: CellSpec) -> str:
    """What is known to be refused: memory or kvm-clock; empty if nothing. The refusal itself is measured once."""
    released = _RELEASED.fullmatch(spec.host_kernel)
    if released is None:
        return ""
    kind = kind_of(spec.backend)
    if not kind.backend.in_release((int(released[1]), int(released[2]))):
        return "memory"
    # offmap (`run` and `wrap`) refuses kvm-clock where it would oops a released kernel. QEMU does not: if the page has
    # no struct page, KVM memremaps it.
    return "kvm-clock" if spec.kvm_clock == "on" and kind.backend.hides and not kind.vmm.is_qemu else ""


def longest_first(specs: Iterable[CellSpec]) -> list[CellSpec]:
    """The order to run cells in, several at a time: within a setting the longest first, so that none is left for last.

    Measured: cells whose memory is taken page by page take longest, then QEMU's, whose guests boot slowest, then those
    that hide, as what is hidden is walked for longer. Firecracker boots an unpacked kernel. A cell that is refused
    takes only the boot of a host.
    """
    settings: dict[tuple[str, str, int, str], list[CellSpec]] = {}
    for spec in specs:
        settings.setdefault(spec.setting, []).append(spec)
    return [spec for cells in settings.values() for spec in sorted(cells, key=_weight)]


def _weight(spec: CellSpec) -> int:
    """The sort key: smaller for cells that take longer."""
    kind = kind_of(spec.backend)
    if known_refusal(spec):
        return 6
    if kind.backend.page_by_page:
        return 0 if kind.backend.needs_module else 1
    if kind.vmm is Vmm.FIRECRACKER:
        return 5
    return 2 if kind.vmm is not Vmm.OFFMAP else 3 if kind.backend.hides else 4
