"""The matrix of the comparison: which cells there are, and in which order they are run.

A cell is one kind of guest RAM, on one host kernel, with one guest. Combinations of which only one can say anything,
because the host kernel lacks what the kind needs, are kept once: their refusal is the result.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Self

from offmap.compare.vm_process import QEMU
from offmap.errors import OffmapError
from offmap.memory.backend import BACKENDS as KINDS
from offmap.memory.backend import Backend

__all__ = [
    "BACKENDS",
    "DEFAULT_AXES",
    "FULL_AXES",
    "NATIVE",
    "OF_THE_MODULE",
    "Axes",
    "CellSpec",
    "cells_of",
    "default_matrix",
    "full_matrix",
    "kind_of",
    "longest_first",
]

NATIVE = "native"
"""As a host kernel: the one that this machine runs, without a disposable host."""

BACKENDS = (*KINDS, QEMU)
"""In the order of the report: the plain kinds first."""


def kind_of(backend: str) -> type[Backend]:
    """What the RAM of a cell is: QEMU's is that of ``unplugged``."""
    return KINDS["unplugged" if backend == QEMU else backend]


OF_THE_MODULE = frozenset(name for name in BACKENDS if kind_of(name).needs_module)
"""Need offmap.ko in the host."""

KVM_CLOCKS = ("auto", "off", "on")
MAX_VCPUS = 64  # more would not be a comparison of memory any more, and no lab host has the time
_RELEASED = re.compile(r"debian:(\d+)\.(\d+)")  # a kernel as released


@dataclass(frozen=True, slots=True, order=True)
class CellSpec:
    """One cell.

    Attributes:
        backend: the kind of guest RAM, as ``offmap run --memory`` names it, or ``qemu-unplugged``.
        host_kernel: as ``offmap lab exec --host-kernel`` takes it; NATIVE for the running one, without a lab host.
        guest_kernel: the same.
        vcpus: of the guest.
        kvm_clock: on, off, or auto: on wherever the host kernel can keep it on such RAM, off elsewhere.
    """

    backend: str
    host_kernel: str = "debian:6.12"
    guest_kernel: str = "debian:6.12"
    vcpus: int = 1
    kvm_clock: str = "auto"

    @property
    def key(self) -> str:
        """A name for files: stable, and no two cells have the same."""
        host, guest = _file_name(self.host_kernel), _file_name(self.guest_kernel)
        return f"{self.backend}_on-{host}_guest-{guest}_{self.vcpus}vcpu_clock-{self.kvm_clock}"

    @property
    def title(self) -> str:
        """A name for people."""
        vcpus = "1 vCPU" if self.vcpus == 1 else f"{self.vcpus} vCPUs"
        clock = "" if self.kvm_clock == "auto" else f", kvm-clock {self.kvm_clock}"
        return f"{self.backend} on {self.host_kernel}, guest {self.guest_kernel}, {vcpus}{clock}"

    def to_json(self) -> dict[str, Any]:
        """For json.dumps."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """What `to_json` gave.

        Raises:
            ValueError: it is no such thing.
        """
        try:
            spec = cls(
                backend=data["backend"],
                host_kernel=data["host_kernel"],
                guest_kernel=data["guest_kernel"],
                vcpus=data["vcpus"],
                kvm_clock=data["kvm_clock"],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"no cell: {error!r}") from None
        named = (spec.backend, spec.host_kernel, spec.guest_kernel, spec.kvm_clock)
        if not all(isinstance(name, str) for name in named) or type(spec.vcpus) is not int:
            raise ValueError(f"no cell: {dict(data)!r}")
        return spec


def _file_name(kernel: str) -> str:
    """``debian:6.12`` as debian-6.12; a path as its last part and a digest of all of it."""
    if re.fullmatch(r"(debian|patched):[0-9.]+", kernel):
        return kernel.replace(":", "-")
    if "/" not in kernel:
        kernel_path = kernel
        if re.fullmatch(r"[a-z]+", kernel):
            return kernel
    else:
        kernel_path = str(Path(kernel).absolute())
    digest = hashlib.sha256(kernel_path.encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9.-]', '-', Path(kernel).name)}-{digest}"


@dataclass(frozen=True, slots=True)
class Axes:
    """What to combine with what."""

    backends: tuple[str, ...] = BACKENDS
    host_kernels: tuple[str, ...] = ("debian:6.12",)
    guest_kernels: tuple[str, ...] = ("debian:6.12",)
    vcpus: tuple[int, ...] = (1,)
    kvm_clocks: tuple[str, ...] = ("auto",)

    def __post_init__(self) -> None:
        for name in self.backends:
            if name not in BACKENDS:
                raise OffmapError(f"{name!r} is no kind of guest RAM", f"choose from {', '.join(BACKENDS)}")
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
        """These axes, with each that is given instead of its own; duplicates count once.

        Raises:
            OffmapError: a value that the axis cannot have.
        """
        given: dict[str, Iterable[Any] | None] = {
            "backends": backends,
            "host_kernels": host_kernels,
            "guest_kernels": guest_kernels,
            "vcpus": vcpus,
            "kvm_clocks": kvm_clocks,
        }
        return replace(self, **{name: tuple(dict.fromkeys(values)) for name, values in given.items() if values})


DEFAULT_AXES = Axes()
FULL_AXES = Axes(
    host_kernels=("debian:6.12", "debian:7.3", "patched:7.3", "debian:6.1"),
    guest_kernels=("debian:6.12", "debian:6.1", "debian:7.3"),
    vcpus=(1, 2),
    kvm_clocks=("off", "on"),
)


def cells_of(axes: Axes) -> tuple[CellSpec, ...]:
    """All combinations that make sense, those that say most first, so that a run that is stopped has been of use.

    What varies slowest is the guest kernel, then vCPUs and kvm-clock, then the host kernel, then the backend.
    """
    return tuple(_sensible(axes))


def _sensible(axes: Axes) -> Iterator[CellSpec]:
    refused: set[tuple[str, str, str]] = set()
    for guest, vcpus, clock, host, backend in product(
        axes.guest_kernels, axes.vcpus, axes.kvm_clocks, axes.host_kernels, axes.backends
    ):
        if why := _refusal(backend, host, clock):
            if (why, backend, host) in refused:
                continue  # whatever the guest, the refusal is the same
            refused.add((why, backend, host))
        yield CellSpec(backend, host, guest, vcpus, clock)


def _refusal(backend: str, host_kernel: str, kvm_clock: str) -> str:
    """Why that is known to be refused; empty if it is not. What is really said is measured, once."""
    released = _RELEASED.fullmatch(host_kernel)
    if released and not kind_of(backend).in_release((int(released[1]), int(released[2]))):
        return "memory"
    # offmap refuses what would oops a kernel as released. With no struct page KVM memremaps the page instead, which
    # QEMU lets happen.
    if kvm_clock == "on" and kind_of(backend).hides and backend != QEMU and released:
        return "kvm-clock"
    return ""


def longest_first(specs: Iterable[CellSpec]) -> list[CellSpec]:
    """The order to run cells in, several at a time: within a setting, so that no long one is left for the end.

    Which kinds take longest was measured: those whose memory is taken page by page, then QEMU, whose guests boot
    slowest. What is known to be refused takes a host's boot and no more, and fills the gaps.
    """
    settings: dict[tuple[str, str, int, str], list[CellSpec]] = {}
    for spec in specs:
        settings.setdefault((spec.host_kernel, spec.guest_kernel, spec.vcpus, spec.kvm_clock), []).append(spec)
    return [spec for cells in settings.values() for spec in sorted(cells, key=_weight)]


def _weight(spec: CellSpec) -> int:
    if _refusal(spec.backend, spec.host_kernel, spec.kvm_clock):
        return len(_LONGEST) + 1
    return _LONGEST.index(spec.backend) if spec.backend in _LONGEST else len(_LONGEST)


_LONGEST = ("secretmem-bridge", "secretmem", "guest_memfd-unmapped", QEMU)


def default_matrix() -> tuple[CellSpec, ...]:
    """Every backend on stock 6.12, with one guest."""
    return cells_of(DEFAULT_AXES)


def full_matrix() -> tuple[CellSpec, ...]:
    """Every backend on every host kernel, with every guest."""
    return cells_of(FULL_AXES)
