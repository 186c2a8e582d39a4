"""What KVM's structures say of one virtual processor that speaks against its guest's memory being hidden.

KVM maps pages of a guest that runs guests of its own (``kvm_vcpu_map``), some of them for microseconds only. No walk of
the page tables need see that. But a vCPU cannot do it without EFER.SVME or CR4.VMXE, and KVM counts each time.
"""

from dataclasses import dataclass

from offmap.audit.btf import Btf, Unknown
from offmap.audit.xarray import Read

_EFER_SVME = 1 << 12  # arch/x86/include/asm/msr-index.h
_CR4_VMXE = 1 << 13  # arch/x86/include/uapi/asm/processor-flags.h


@dataclass(frozen=True)
class VCpu:
    """A virtual processor.

    Attributes:
        number: its index in the VM.
        nested: it has switched on what it takes to run guests of its own.
        nested_runs: how often it has run one.
        mapped: members of KVM's structures that hold a kernel mapping of a guest page (``struct kvm_host_map``).
        once_mapped: those that held one, and hold none now.
        nested_once: it once had EFER.SVME set. KVM may have mapped a page of its guest though it ran none (VMSAVE).
    """

    number: int
    nested: bool
    nested_runs: int
    mapped: tuple[str, ...] = ()
    once_mapped: tuple[str, ...] = ()
    nested_once: bool = False

    @property
    def doubts(self) -> tuple[str, ...]:
        """What speaks against hidden memory, to be read after "vCPU N"."""
        found = [f"has a page of its guest mapped in KVM ({name})" for name in self.mapped]
        found += [f"once had a page of its guest mapped in KVM ({name})" for name in self.once_mapped]
        if self.nested_runs:
            found.append(f"has run guests of its own ({self.nested_runs} times), for which KVM maps pages of its guest")
        elif self.nested:
            found.append("can run guests of its own (EFER.SVME or CR4.VMXE), for which KVM maps pages of its guest")
        elif self.nested_once:
            found.append("could once run guests of its own (EFER.SVME), for which KVM maps pages of its guest")
        return tuple(found)


def vcpu_at(read: Read, kernel: Btf, vendor: tuple[Btf, str], at: int) -> VCpu:
    """The vCPU whose ``struct kvm_vcpu``, the first member of its vendor's structure, is there.

    Raises:
        Unknown: it cannot be read.
    """

    def field(size: int, *members: str) -> int:
        return int.from_bytes(read(at + kernel.offset("kvm_vcpu", *members), size), "little")

    types, name = vendor
    hva = types.offset("kvm_host_map", "hva")
    size = types.size("kvm_host_map")
    maps = {path: read(at + offset, size) for path, offset in types.places(name, "kvm_host_map")}
    mapped = tuple(path for path, raw in maps.items() if any(raw[hva : hva + 8]))
    return VCpu(
        field(4, "vcpu_idx"),
        bool(field(8, "arch", "efer") & _EFER_SVME or field(8, "arch", "cr4") & _CR4_VMXE),
        field(8, "stat", "nested_run"),
        mapped,
        # KVM leaves the page's number (kvm_vcpu_unmap).
        tuple(path for path, raw in maps.items() if path not in mapped and any(raw)),
        nested_once=any(any(read(at + offset, 8)) for offset in _once_nested(types, name)),
    )


def _once_nested(types: Btf, name: str) -> list[int]:
    """Where the address of the page is that KVM makes when EFER.SVME is set. It frees that page later, and leaves the
    address (``svm_allocate_nested``, ``svm_free_nested``)."""
    try:
        return [types.offset(name, "nested", "vmcb02", "pa")]
    except Unknown:
        return []
