"""The mappings of guest pages that KVM keeps for itself (``gfn_to_pfn_cache``, ``virt/kvm/pfncache.c``)."""

from collections.abc import Iterator, Sequence
from functools import lru_cache

from offmap.audit.btf import Btf, Unknown
from offmap.audit.kernel_list import links
from offmap.audit.kvm_times import KvmTimes

_MOST_CACHES = 1 << 16
_USER_BITS = 56  # 5-level page tables: the user half (Documentation/arch/x86/x86_64/mm.rst)


class KvmCaches(KvmTimes):
    """Reads them by the address of a VM's ``struct kvm``, and those of its vCPUs."""

    def _once_mapped(self, address: int, vcpus: list[int], now: set[int]) -> Iterator[str]:
        """Caches that had a mapping: KVM leaves the page's address in the VMM in them (``kvm_gpc_deactivate``)."""
        where = self._btf.offset("gfn_to_pfn_cache", "uhva")
        for structure, at in (("kvm", address), *(("kvm_vcpu", vcpu) for vcpu in vcpus)):
            for name, offset in _places(self._btf, structure):
                # Before the first one there is 0 or an error, which is an address of the kernel's (KVM_HVA_ERR_BAD).
                if at + offset not in now and 0 < self._pointer(at + offset + where) < 1 << _USER_BITS:
                    yield name

    def _caches(self, address: int) -> Iterator[tuple[int, int]]:
        """Each cache of KVM's that holds a mapping, and its guest-physical address (``virt/kvm/pfncache.c``)."""
        node = self._btf.offset("gfn_to_pfn_cache", "list")
        for at in links(self._read, address + self._btf.offset("kvm", "gpc_list"), _MOST_CACHES):
            if self._field(at - node, "gfn_to_pfn_cache", "khva"):
                yield at - node, self._field(at - node, "gfn_to_pfn_cache", "gpa")

    def _clocks(self, vcpus: Sequence[int]) -> list[int]:
        """Where each vCPU has the cache of its kvm-clock; none if this KVM has no such thing."""
        try:
            clock = self._btf.offset("kvm_vcpu", "arch", "pv_time")
        except Unknown:
            return []
        return [at + clock for at in vcpus]


@lru_cache
def _places(btf: Btf, structure: str) -> list[tuple[str, int]]:
    """Each cache that lies in this structure: its path, and its byte offset."""
    return btf.places(structure, "gfn_to_pfn_cache")
