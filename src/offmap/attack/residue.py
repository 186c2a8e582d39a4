"""What the attacker reads of a guest whose RAM is hidden: copies that the host's kernel keeps where it maps them."""

from collections.abc import Iterator

import numpy as np

from offmap.attack.host import Host
from offmap.attack.linux import Process
from offmap.attack.result import Residue
from offmap.attack.vm import GuestMemory, vcpus
from offmap.audit.mappings import KernelMappings, covered
from offmap.uapi.page import PAGE_SHIFT, PAGE_SIZE

_KVM_RUN_PAGES = 2  # struct kvm_run and the page for port I/O (KVM_PIO_PAGE_OFFSET)
_FILE_NAMES = 8  # named in the note
_LARGEST_FPSTATE = 1 << 16
_USER_HALF = 1 << 47


def residues_of(
    host: Host, vmm: Process, kvm: int, memory: GuestMemory | None, mappings: KernelMappings | None
) -> Iterator[Residue]:
    """Read each once, and say how much it is.

    Args:
        memory: the guest's.
        mappings: all of the host kernel's, if they were looked for. Only then the VMM's own memory is counted.
    """
    kernel = host.kernel
    registers = vectors = run = 0
    values = []
    for vcpu in vcpus(host, kvm):
        size = 8 * kernel.elements("kvm_vcpu", "arch", "regs")
        registers += len(host.read(vcpu + kernel.offset("kvm_vcpu", "arch", "regs"), size))
        values.append(f"CR3 {host.field(vcpu, 'kvm_vcpu', 'arch', 'cr3'):#x}")
        vectors += _vectors(host, vcpu)
        page = host.pointer_in(vcpu, "kvm_vcpu", "run")
        run += len(host.read(page, PAGE_SIZE)) * _KVM_RUN_PAGES
    yield Residue(name="registers of the vCPUs, in struct kvm_vcpu", bytes=registers, note=", ".join(values))
    if vectors:
        yield Residue(name="vector registers of the vCPUs", bytes=vectors, note="struct fpstate, as of the last exit")
    yield Residue(name="kvm_run", bytes=run, note="what the last exits of each vCPU said, and data of port I/O")
    cached, names = 0, []
    for name, _, pages in host.cached_files(vmm):
        cached += pages * PAGE_SIZE
        names.append(name)
    if cached:
        more = f" and {len(names) - _FILE_NAMES} more" if len(names) > _FILE_NAMES else ""
        note = "pages of files that the VMM has open: " + ", ".join(names[:_FILE_NAMES]) + more
        yield Residue(name="page cache", bytes=cached, note=note)
    if memory is not None and mappings is not None:
        note = "its buffers of consoles, drives and cards; libraries"
        if own := _own_memory(host, memory, mappings):
            yield Residue(name="memory of the VMM's own", bytes=own, note=note)


def _vectors(host: Host, vcpu: int) -> int:
    """Bytes of a vCPU's vector registers; 0 where this build keeps them elsewhere."""
    if "kvm_vcpu.arch.guest_fpu.fpstate" not in host.kernel.offsets:
        return 0
    state = host.pointer_in(vcpu, "kvm_vcpu", "arch", "guest_fpu", "fpstate")
    size = host.field(state, "fpstate", "size", size=4)
    if not 0 < size <= _LARGEST_FPSTATE:
        return 0
    return len(host.read(state + host.kernel.offset("fpstate", "regs"), size))


def _own_memory(host: Host, memory: GuestMemory, mappings: KernelMappings) -> int:
    """Bytes of the VMM's process that the kernel maps too, and that are no guest RAM."""
    frames = [np.zeros(0, dtype=np.int64)]
    for size, _, entry in host.leaf_entries(memory.table, 0, _USER_HALF):
        first = (entry & np.uint64(host.mask & -size)).astype(np.int64) >> PAGE_SHIFT
        frames.append((first[:, None] + np.arange(size >> PAGE_SHIFT, dtype=np.int64)).reshape(-1))
    _, of_guest = memory.frames()
    own = np.setdiff1d(np.concatenate(frames), of_guest)
    return int(covered(mappings.runs, own.astype(np.uint64)).sum()) * PAGE_SIZE
