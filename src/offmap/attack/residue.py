"""Copies of a guest's state that the host's kernel keeps where it maps them, whatever the guest's RAM is.

An attacker reads them first. So each is searched for the secret before it is said that a chain ends.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from offmap.attack.host import Host
from offmap.attack.linux import Lost
from offmap.attack.result import Residue
from offmap.attack.vm import GuestMemory, Pages, vcpus
from offmap.audit.mappings import KernelMappings, covered
from offmap.uapi.page import PAGE_SHIFT, PAGE_SIZE

_FILE_NAMES = 8  # named in the note
_LARGEST_FPSTATE = 1 << 16
_LARGEST_VCPU = 1 << 16
_USER_HALF = 1 << 47

Parts = Iterator[tuple[int, bytes]]
"""Pieces of memory: address, content."""


@dataclass(frozen=True)
class Copies:
    """Memory that has something of the guest's.

    Attributes:
        residue: what it is, and how much.
        parts: reads it.
    """

    residue: Residue
    parts: Callable[[], Parts]


def copies_of_kvm(host: Host, kvm: int) -> Iterator[Copies]:
    """What KVM keeps of a guest's vCPUs.

    Raises:
        Lost, Unknown: it is not where it should be.
    """
    cpus = vcpus(host, kvm)
    kernel = host.kernel
    registers = 8 * kernel.elements("kvm_vcpu", "arch", "regs") * len(cpus)
    values = [f"CR3 {host.field(vcpu, 'kvm_vcpu', 'arch', 'cr3'):#x}" for vcpu in cpus]
    size = kernel.size("kvm_vcpu")
    if not 0 < size <= _LARGEST_VCPU:
        raise Lost(f"struct kvm_vcpu cannot have {size} bytes")
    yield Copies(
        Residue(name="registers of the vCPUs, in struct kvm_vcpu", bytes=registers, note=", ".join(values)),
        lambda: ((vcpu, host.read(vcpu, size)) for vcpu in cpus),
    )
    vectors = [_vectors(host, vcpu) for vcpu in cpus]
    if total := sum(size for _, size in vectors):
        yield Copies(
            Residue(name="vector registers of the vCPUs", bytes=total, note="struct fpstate, as of the last exit"),
            lambda: ((at, host.read(at, size)) for at, size in vectors if size),
        )
    pages = [
        host.pointer_in(vcpu, "kvm_vcpu", *members) & -PAGE_SIZE
        for vcpu in cpus
        for members in (("run",), ("arch", "pio_data"))
    ]
    note = "what the last exits of each vCPU said, and data of port I/O"
    yield Copies(
        Residue(name="kvm_run", bytes=len(pages) * PAGE_SIZE, note=note),
        lambda: ((page, host.read(page, PAGE_SIZE)) for page in pages),
    )


def _vectors(host: Host, vcpu: int) -> tuple[int, int]:
    """Where a vCPU's vector registers are, and how many bytes; 0 where this build keeps them elsewhere."""
    if "kvm_vcpu.arch.guest_fpu.fpstate" not in host.kernel.offsets:
        return 0, 0
    state = host.pointer_in(vcpu, "kvm_vcpu", "arch", "guest_fpu", "fpstate")
    size = host.field(state, "fpstate", "size", size=4)
    if not 0 < size <= _LARGEST_FPSTATE:
        return 0, 0
    return state + host.kernel.offset("fpstate", "regs"), size


def page_cache_residue(
    files: Sequence[tuple[str, Sequence[tuple[int, int]]]], mappings: KernelMappings
) -> Iterator[Residue]:
    """What the direct map has of the page cache of files, if that is anything.

    Args:
        files: names, and the pages of each (`pages_of`).
    """
    sizes: Counter[str] = Counter()
    for name, cached in files:
        frames = np.array([pa >> PAGE_SHIFT for _, pa in cached], dtype=np.uint64)
        sizes[name] += int(covered(mappings.direct, frames).sum()) * PAGE_SIZE
    names = [name for name, size in sizes.items() if size]
    if names:
        more = f" and {len(names) - _FILE_NAMES} more" if len(names) > _FILE_NAMES else ""
        note = "pages of files that the VMM has open: " + ", ".join(names[:_FILE_NAMES]) + more
        yield Residue(name="page cache", bytes=sum(sizes.values()), note=note)


def copies_of_vmm(host: Host, memory: GuestMemory, pages: Pages, mappings: KernelMappings) -> Copies:
    """Memory of the VMM's process that is in the direct map too, and that is no guest RAM."""
    where, frames = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for size, va, entry in host.leaf_entries(memory.table, 0, _USER_HALF):
        within = np.arange(size >> PAGE_SHIFT, dtype=np.int64)
        first = (entry & np.uint64(host.mask & -size)).astype(np.int64) >> PAGE_SHIFT
        where.append(((va >> PAGE_SHIFT)[:, None] + within).reshape(-1))
        frames.append((first[:, None] + within).reshape(-1))
    page, frame = np.concatenate(where), np.concatenate(frames)
    own = covered(mappings.direct, frame.astype(np.uint64)) & ~np.isin(frame, pages.host)
    page, frame = page[own], frame[own]
    note = "its buffers of consoles, drives and cards; libraries"

    def parts() -> Parts:
        contents = host.mapped_pages((frame << PAGE_SHIFT).tolist())
        for at, data in zip((page << PAGE_SHIFT).tolist(), contents, strict=True):
            if data is not None:  # else it was given away meanwhile
                yield at, data

    return Copies(Residue(name="memory of the VMM's own", bytes=len(np.unique(frame)) * PAGE_SIZE, note=note), parts)
