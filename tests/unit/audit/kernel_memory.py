"""Kernel memory made by a test: structures with offsets of our own choosing, lists, and xarrays."""

import struct

from offmap.audit.btf import Unknown

POISON = 0xDEAD_0000_0000_0100  # LIST_POISON1

OFFSETS: dict[tuple[str, ...], int] = {
    ("xarray", "xa_head"): 0x8,
    ("xa_node", "shift"): 0x0,
    ("xa_node", "parent"): 0x8,
    ("xa_node", "array"): 0x10,
    ("xa_node", "slots"): 0x28,
    ("kvm", "mm"): 0x0,
    ("kvm", "nr_memslot_pages"): 0x8,
    ("kvm", "memslots"): 0x10,
    ("kvm", "vcpu_array"): 0x20,
    ("kvm", "online_vcpus"): 0x30,
    ("kvm", "gpc_list"): 0x40,
    ("kvm", "vm_list"): 0x50,
    ("kvm", "srcu"): 0x60,
    ("kvm", "mmu_invalidate_seq"): 0x80,
    ("kvm", "stats_id"): 0x90,
    ("kvm", "debugfs_dentry"): 0xC8,
    ("dentry", "d_inode"): 0x8,
    ("srcu_struct", "srcu_sup"): 0x8,
    ("srcu_usage", "srcu_last_gp_end"): 0x10,
    ("kvm_memslots", "generation"): 0x0,
    ("kvm_memslots", "node_idx"): 0x8,
    ("kvm_memslots", "id_hash"): 0x10,
    ("kvm_memory_slot", "id_node"): 0x20,
    ("kvm_memory_slot", "base_gfn"): 0x60,
    ("kvm_memory_slot", "npages"): 0x68,
    ("kvm_memory_slot", "userspace_addr"): 0x70,
    ("kvm_memory_slot", "flags"): 0x78,
    ("kvm_memory_slot", "id"): 0x7C,
    ("kvm_memory_slot", "gmem", "file"): 0x80,
    ("kvm_memory_slot", "gmem", "pgoff"): 0x88,
    ("file", "f_inode"): 0x8,
    ("inode", "i_sb"): 0x8,
    ("inode", "i_mapping"): 0x10,
    ("inode", "i_ino"): 0x18,
    ("inode", "i_ctime_sec"): 0x20,
    ("inode", "i_ctime_nsec"): 0x28,
    ("super_block", "s_dev"): 0x8,
    ("address_space", "host"): 0x0,
    ("address_space", "i_pages"): 0x8,
    ("gfn_to_pfn_cache", "list"): 0x10,
    ("gfn_to_pfn_cache", "khva"): 0x20,
    ("gfn_to_pfn_cache", "gpa"): 0x28,
    ("gfn_to_pfn_cache", "uhva"): 0x30,
    ("kvm_vcpu", "vcpu_idx"): 0x0,
    ("kvm_vcpu", "arch", "efer"): 0x8,
    ("kvm_vcpu", "arch", "cr4"): 0x10,
    ("kvm_vcpu", "stat", "nested_run"): 0x18,
    ("kvm_host_map", "hva"): 0x8,
    ("kvm_host_map", "gfn"): 0x10,
    ("vcpu_svm", "nested", "vmcb02", "pa"): 0x180,
    ("pid_namespace", "idr", "idr_rt"): 0x0,
    ("pid", "tasks"): 0x20,
    ("task_struct", "flags"): 0x8,
    ("task_struct", "mm"): 0x10,
    ("task_struct", "pid"): 0x18,
    ("task_struct", "tgid"): 0x1C,
    ("task_struct", "pid_links"): 0x30,
}
SIZES = {"xa_node": 0x28 + 8 * 64, "page": 64, "kvm_host_map": 0x20}
ELEMENTS: dict[tuple[str, ...], int] = {
    ("xa_node", "slots"): 64,
    ("kvm", "memslots"): 2,
    ("kvm_memory_slot", "id_node"): 2,
    ("kvm_memslots", "id_hash"): 128,
}
PLACES = {
    ("vcpu_svm", "kvm_host_map"): [("sev_es.ghcb_map", 0x100)],
    ("kvm", "gfn_to_pfn_cache"): [],
    ("kvm_vcpu", "gfn_to_pfn_cache"): [("arch.pv_time", 0x200)],
}


class Types:
    """BTF of these structures."""

    def offset(self, name: str, *members: str) -> int:
        if (name, *members) not in OFFSETS:
            raise Unknown(f"struct {name} has no member {'.'.join(members)}")
        return OFFSETS[(name, *members)]

    def size(self, name: str) -> int:
        return SIZES[name]

    def elements(self, name: str, *members: str) -> int:
        return ELEMENTS[(name, *members)]

    def places(self, name: str, wanted: str) -> list[tuple[str, int]]:
        return PLACES[name, wanted]


class Memory:
    """Bytes by their addresses; what was never written reads as zero, as /proc/kcore has it."""

    def __init__(self) -> None:
        self.bytes: dict[int, int] = {}
        self._free = 0x10_0000

    def make(self, size: int = 0x1000) -> int:
        """Address of a new structure."""
        self._free += -(-size // 0x1000) * 0x1000
        return self._free

    def read(self, va: int, size: int) -> bytes:
        return bytes(self.bytes.get(va + index, 0) for index in range(size))

    def write(self, va: int, value: int, size: int = 8) -> None:
        for index, byte in enumerate(value.to_bytes(size, "little")):
            self.bytes[va + index] = byte

    def put(self, base: int, name: str, *members: str, value: int, size: int = 8) -> None:
        self.write(base + OFFSETS[(name, *members)], value, size)

    def get(self, va: int) -> int:
        return int(struct.unpack("<Q", self.read(va, 8))[0])

    def list_head(self, at: int) -> None:
        """An empty list."""
        self.write(at, at)
        self.write(at + 8, at)

    def list_add(self, new: int, head: int) -> None:
        """At the front, as KVM does it."""
        first = self.get(head)
        self.write(new, first)
        self.write(new + 8, head)
        self.write(first + 8, new)
        self.write(head, new)

    def list_del(self, entry: int) -> None:
        following, before = self.get(entry), self.get(entry + 8)
        self.write(before, following)
        self.write(following + 8, before)
        self.write(entry, POISON)

    def xarray(self, at: int, found: dict[int, int]) -> list[int]:
        """An xarray of two levels with these entries; the addresses of its nodes, the top one first."""
        top = self._node(at, 6, 0)
        nodes = [top]
        for index in sorted({index >> 6 for index in found}):
            leaf = self._node(at, 0, top)
            nodes.append(leaf)
            self._slot(top, index, leaf | 2)
            for number, value in found.items():
                if number >> 6 == index:
                    self._slot(leaf, number & 63, value)
        self.put(at, "xarray", "xa_head", value=top | 2)
        return nodes

    def _node(self, array: int, shift: int, parent: int) -> int:
        node = self.make()
        self.put(node, "xa_node", "shift", value=shift, size=1)
        self.put(node, "xa_node", "parent", value=parent)
        self.put(node, "xa_node", "array", value=array)
        return node

    def _slot(self, node: int, index: int, value: int) -> None:
        self.write(node + OFFSETS["xa_node", "slots"] + 8 * index, value)
