"""A host with one VM, made of bytes: page tables, KVM's structures, and a guest whose process has a secret.

The layout of the structures is of our own choosing; what reads them is told it. The primitive goes by the page tables
that stand in this memory, as a processor would.
"""

import hashlib
import struct
from dataclasses import dataclass, field

from offmap.attack.knowledge import Kernel
from offmap.attack.primitive import NotMapped, Primitive
from offmap.report.typed import Address

PAGE = 4096
TEXT = 0xFFFF_FFFF_8100_0000
DIRECT_MAP = 0xFFFF_8880_0000_0000
START_KERNEL_MAP = 0xFFFF_FFFF_8000_0000
RAM = 8 << 20
GUEST_AT, GUEST_SIZE = 4 << 20, 4 << 20  # the guest's RAM, in the host's
IMAGE_AT = 2 << 20  # where both kernels have their image
VMEMMAP = 0xFFFF_EA00_0000_0000
HVA = 0x7F00_0000_0000
BANNER = "Linux version 6.12.0-test (somebody) #1"
SECRET = b"0123456789abcdeffedcba9876543210"
DIGEST = hashlib.sha256(SECRET).hexdigest()
PID = 42

OFFSETS = {
    "task_struct.tasks": 0x10,
    "task_struct.pid": 0x20,
    "task_struct.comm": 0x30,
    "task_struct.mm": 0x40,
    "task_struct.files": 0x48,
    "task_struct.real_parent": 0x50,
    "mm_struct.pgd": 0x8,
    "mm_struct.start_brk": 0x10,
    "mm_struct.brk": 0x18,
    "mm_struct.mm_mt.ma_root": 0x20,
    "maple_range_64.pivot": 0x8,
    "maple_range_64.slot": 0x20,
    "maple_arange_64.pivot": 0x8,
    "maple_arange_64.slot": 0x18,
    "vm_area_struct.vm_start": 0x0,
    "vm_area_struct.vm_end": 0x8,
    "vm_area_struct.vm_flags": 0x10,
    "vm_area_struct.vm_file": 0x18,
    "inode.i_sb": 0x10,
    "super_block.s_magic": 0x8,
    "files_struct.fdt": 0x8,
    "fdtable.max_fds": 0x0,
    "fdtable.fd": 0x8,
    "file.f_path.dentry": 0x8,
    "file.private_data": 0x10,
    "file.f_inode": 0x18,
    "file.f_mapping": 0x20,
    "super_block.s_type": 0x10,
    "file_system_type.name": 0x8,
    "address_space.host": 0x0,
    "dentry.d_name.name": 0x8,
    "inode.i_mapping": 0x8,
    "address_space.nrpages": 0x8,
    "address_space.i_pages": 0x10,
    "xarray.xa_head": 0x8,
    "xa_node.shift": 0x0,
    "xa_node.parent": 0x8,
    "xa_node.array": 0x10,
    "xa_node.slots": 0x28,
    "kvm.mm": 0x0,
    "kvm.nr_memslot_pages": 0x8,
    "kvm.memslots": 0x10,
    "kvm.vcpu_array": 0x20,
    "kvm.vm_list": 0x60,
    "kvm_memslots.generation": 0x0,
    "kvm_memslots.node_idx": 0x8,
    "kvm_memslots.id_hash": 0x10,
    "kvm_memory_slot.id_node": 0x20,
    "kvm_memory_slot.base_gfn": 0x60,
    "kvm_memory_slot.npages": 0x68,
    "kvm_memory_slot.userspace_addr": 0x70,
    "kvm_memory_slot.flags": 0x78,
    "kvm_memory_slot.id": 0x7C,
    "kvm_memory_slot.gmem.file": 0x80,
    "kvm_memory_slot.gmem.pgoff": 0x88,
    "kvm_vcpu.kvm": 0x0,
    "kvm_vcpu.run": 0x8,
    "kvm_vcpu.arch.pio_data": 0xA8,
    "kvm_vcpu.arch.regs": 0x10,
    "kvm_vcpu.arch.cr3": 0x90,
    "kvm_vcpu.arch.root_mmu.root.hpa": 0x98,
    "kvm_vcpu.arch.root_mmu.root_role.word": 0xA0,
}
ARRAYS = {
    "maple_range_64.pivot": 3,
    "maple_arange_64.pivot": 2,
    "kvm.memslots": 2,
    "kvm_memslots.id_hash": 4,
    "kvm_memory_slot.id_node": 2,
    "xa_node.slots": 64,
    "kvm_vcpu.arch.regs": 16,
}
SYMBOLS = {
    "_text": 0,
    "linux_banner": 0x1000,
    "page_offset_base": 0x1100,
    "phys_base": 0x1108,
    "vmemmap_base": 0x1110,
    "init_task": 0x2000,
    "init_top_pgt": 0x3000,
}
KNOWN = Kernel(
    banner=BANNER,
    symbols={name: Address(TEXT + at) for name, at in SYMBOLS.items()},
    offsets=OFFSETS,
    sizes={"xa_node": 0x28 + 8 * 64, "page": 64, "kvm_vcpu": 0x100},
    arrays=ARRAYS,
)


@dataclass
class Tables:
    """Page tables of four levels in physical memory."""

    memory: bytearray
    frames: "list[int]"
    top: int

    def map(self, va: int, pa: int, flags: int = 3) -> None:
        """Map one page."""
        table = self.top
        for shift in (39, 30, 21):
            at = table + (va >> shift & 511) * 8
            entry = int.from_bytes(self.memory[at : at + 8], "little")
            if not entry:
                entry = self.frames.pop() | 3
                self.memory[at : at + 8] = entry.to_bytes(8, "little")
            table = entry & ~0xFFF
        at = table + (va >> 12 & 511) * 8
        self.memory[at : at + 8] = (pa | flags).to_bytes(8, "little") if pa >= 0 else bytes(8)

    def unmap(self, va: int) -> None:
        self.map(va, -1)

    def walk(self, va: int) -> int | None:
        """The physical address."""
        table = self.top
        for shift in (39, 30, 21, 12):
            at = table + (va >> shift & 511) * 8
            entry = int.from_bytes(self.memory[at : at + 8], "little")
            if not entry & 1:
                return None
            table = entry & ~0xFFF
        return table | va & 0xFFF


@dataclass
class System:
    """A kernel in a stretch of physical memory.

    Attributes:
        base: where its physical address 0 is.
        slide: of its image.
        frames: its free pages, the next one last.
    """

    memory: bytearray
    base: int
    size: int
    slide: int
    frames: list[int] = field(default_factory=list)
    at: int = 0x10_0000  # where structures go

    def __post_init__(self) -> None:
        self.frames = list(range(0xF_0000, 0x1_0000, -PAGE))

    def symbol(self, name: str) -> int:
        return TEXT + self.slide + SYMBOLS[name]

    def place(self, va: int) -> int:
        """Physical address of an address of the image or of the direct map."""
        return va - DIRECT_MAP if va < START_KERNEL_MAP else va - TEXT - self.slide + IMAGE_AT

    def put(self, va: int, data: bytes) -> None:
        at = self.base + self.place(va)
        self.memory[at : at + len(data)] = data

    def new(self, name: str, /, size: int = 0x100, **values: int) -> int:
        """A structure with these 8-byte members (a dot is written as two underscores)."""
        va = DIRECT_MAP + self.at
        self.at += size
        self.set(va, name, **values)
        return va

    def set(self, va: int, name: str, /, **values: int) -> None:
        for member, value in values.items():
            self.put(va + OFFSETS[f"{name}.{member.replace('__', '.')}"], value.to_bytes(8, "little"))

    def text(self, words: str) -> int:
        va = self.new("")
        self.put(va, words.encode() + b"\0")
        return va

    def processes(self, *tasks: int) -> None:
        """Link them behind init_task."""
        nodes = [task + OFFSETS["task_struct.tasks"] for task in (self.symbol("init_task"), *tasks)]
        for number, node in enumerate(nodes):
            self.put(node, struct.pack("<QQ", nodes[(number + 1) % len(nodes)], nodes[number - 1]))

    def start(self) -> None:
        self.put(self.symbol("linux_banner"), BANNER.encode() + b"\n\0")
        self.put(self.symbol("page_offset_base"), DIRECT_MAP.to_bytes(8, "little"))
        phys_base = (IMAGE_AT - (TEXT + self.slide - START_KERNEL_MAP)) % (1 << 64)
        self.put(self.symbol("phys_base"), phys_base.to_bytes(8, "little"))
        task = self.symbol("init_task")
        self.put(task + OFFSETS["task_struct.comm"], b"swapper/0\0")
        self.set(task, "task_struct", real_parent=task)

    def process(self, pid: int, name: str, table: int, **members: int) -> tuple[int, int]:
        """Its task and its address space."""
        memory = self.new("mm_struct", pgd=DIRECT_MAP + table, start_brk=0x1000_0000, brk=0x1000_2000)
        task = self.new("task_struct", pid=pid, mm=memory, **members)
        self.put(task + OFFSETS["task_struct.comm"], name.encode() + b"\0")
        return task, memory


class Machine(Primitive):
    """The whole, and the primitive that reads it.

    Args:
        hidden: the guest's RAM is not in the host's direct map.
        slide: what KASLR moved the guest's image by.
    """

    name = "test"

    def __init__(self, hidden: bool = False, slide: int = 0x1200_0000) -> None:
        super().__init__()
        self.memory = bytearray(RAM)
        self.host = System(self.memory, 0, GUEST_AT, 0x400_0000)
        self.guest = System(self.memory, GUEST_AT, GUEST_SIZE, slide)
        self.tables = Tables(self.memory, self.host.frames, IMAGE_AT + SYMBOLS["init_top_pgt"])
        for page in range(0, RAM, PAGE):
            if page < GUEST_AT or not hidden:
                self.tables.map(DIRECT_MAP + page, page)
        for page in range(0, 0x4000, PAGE):
            self.tables.map(TEXT + self.host.slide + page, IMAGE_AT + page)
        self._make_guest()
        self._make_host()

    def _make_guest(self) -> None:
        guest = self.guest
        guest.start()
        # Within the guest, physical addresses begin at 0.
        view = memoryview(self.memory)[GUEST_AT:]
        user = self.guest_user = Tables(view, guest.frames, guest.frames.pop())  # type: ignore[arg-type]
        page = guest.frames.pop()
        user.map(0x1000_1000, page, 7)
        secret = b"OFFMAP-SECRET-" + SECRET
        guest.put(DIRECT_MAP + page + 0x123, secret)
        self.secret_page = GUEST_AT + page
        task, _ = guest.process(7, "sh", user.top)
        guest.processes(task)

    def _make_host(self) -> None:
        host = self.host
        host.start()
        user = Tables(self.memory, host.frames, host.frames.pop())
        nested = Tables(self.memory, host.frames, host.frames.pop())
        for page in range(0, GUEST_SIZE, PAGE):
            user.map(HVA + page, GUEST_AT + page, 7)
            nested.map(page, GUEST_AT + page, 7)
        self.user, self.nested = user, nested
        kvm, slots = host.new("kvm"), host.new("kvm_memslots")
        slot = host.new("kvm_memory_slot", base_gfn=0, npages=GUEST_SIZE // PAGE, userspace_addr=HVA)
        host.put(slots + OFFSETS["kvm_memslots.id_hash"], struct.pack("<Q", slot + OFFSETS["kvm_memory_slot.id_node"]))
        run = host.new("", PAGE)
        vcpu = host.new("kvm_vcpu", kvm=kvm, run=run, arch__cr3=0x1000, arch__root_mmu__root__hpa=nested.top)
        host.set(vcpu, "kvm_vcpu", arch__pio_data=host.new("", PAGE))
        host.set(vcpu, "kvm_vcpu", arch__root_mmu__root_role__word=4)
        entry = host.new("dentry", d_name__name=host.text("kvm-vm"))
        mapping = host.new("address_space")
        file_system = host.new("file_system_type", name=host.text("anon_inodefs"))
        inode = host.new("inode", i_mapping=mapping, i_sb=host.new("super_block", s_type=file_system))
        file = host.new("file", f_path__dentry=entry, private_data=kvm, f_inode=inode, f_mapping=mapping)
        self.vm_file, self.slots = file, slots
        self.files = host.new("")
        table = host.new("fdtable", max_fds=4, fd=self.files)
        host.put(self.files + 8, struct.pack("<Q", file))
        task, memory = self.task, self.mm = host.process(
            PID, "qemu", user.top, files=host.new("files_struct", fdt=table)
        )
        self._make_tree(memory)
        host.set(kvm, "kvm", mm=memory, nr_memslot_pages=GUEST_SIZE // PAGE, memslots=slots)
        host.put(kvm + OFFSETS["kvm.vcpu_array"] + OFFSETS["xarray.xa_head"], struct.pack("<Q", vcpu))
        host.processes(task)
        self.kvm, self.slot, self.vcpu = kvm, slot, vcpu
        self.list_vms(kvm)

    def take(self, page: int) -> None:
        """Take a page of the guest's out of the VMM's page tables, and so out of KVM's own."""
        self.user.unmap(HVA + page)
        self.nested.unmap(page)

    def guest_memfd(self, *pages: int) -> None:
        """Let the slot have a guest_memfd with these pages of the host, for the guest's pages from 0 on."""
        host = self.host
        host.put(host.symbol("vmemmap_base"), VMEMMAP.to_bytes(8, "little"))
        file = self._file("guest_memfd", nrpages=len(pages))
        inode = self.value(file + OFFSETS["file.f_inode"])
        mapping = self.value(inode + OFFSETS["inode.i_mapping"])
        host.at = -(-host.at // PAGE) * PAGE
        node = host.new("", PAGE)
        array = mapping + OFFSETS["address_space.i_pages"]
        host.set(array, "xarray", xa_head=node + 2)
        host.set(node, "xa_node", array=array)
        entries = struct.pack(f"<{len(pages)}Q", *(VMEMMAP + page // PAGE * 64 for page in pages))
        host.put(node + OFFSETS["xa_node.slots"], entries)
        host.set(self.slot, "kvm_memory_slot", gmem__file=file)
        host.put(self.slot + OFFSETS["kvm_memory_slot.flags"], struct.pack("<I", 1 << 2))

    def value(self, va: int) -> int:
        """The number at an address of the host's."""
        at = self.host.place(va)
        return int.from_bytes(self.memory[at : at + 8], "little")

    def list_vms(self, *vms: int) -> None:
        """Put these on KVM's list."""
        nodes = [self.host.new(""), *(kvm + OFFSETS["kvm.vm_list"] for kvm in vms)]
        for number, node in enumerate(nodes):
            self.host.put(node, struct.pack("<QQ", nodes[(number + 1) % len(nodes)], nodes[number - 1]))

    def open_drive(self, content: bytes, overlay: str = "") -> None:
        """Let the VMM have a file open of which the host has a page in its cache.

        Args:
            overlay: it lies on one: "old", as until Linux 6.12, or "new".
        """
        host, page = self.host, self.host.frames.pop()
        host.put(DIRECT_MAP + page, content)
        host.put(host.symbol("vmemmap_base"), VMEMMAP.to_bytes(8, "little"))
        file = self._file("ext4", nrpages=1)
        mapping = int.from_bytes(self.memory[host.place(file) + OFFSETS["file.f_mapping"] :][:8], "little")
        head = mapping + OFFSETS["address_space.i_pages"] + OFFSETS["xarray.xa_head"]
        host.put(head, struct.pack("<Q", VMEMMAP + page // PAGE * 64))
        if overlay:
            above = self._file("overlay", nrpages=0)
            real = file
            if overlay == "new":
                real = host.new("")
                host.put(real, struct.pack("<Q", file))
            host.set(above, "file", private_data=real)
            file = above
        host.put(self.files + 16, struct.pack("<Q", file))

    def _file(self, kind: str, nrpages: int) -> int:
        host = self.host
        file_system = host.new("file_system_type", name=host.text(kind))
        inode = host.new("inode", i_sb=host.new("super_block", s_type=file_system))
        mapping = host.new("address_space", nrpages=nrpages, host=inode)
        host.set(inode, "inode", i_mapping=mapping)
        entry = host.new("dentry", d_name__name=host.text("root.img"))
        return host.new("file", f_path__dentry=entry, f_inode=inode, f_mapping=mapping)

    def _make_tree(self, memory: int) -> None:
        """The VMM's mappings: one of guest RAM, in a leaf below a node."""
        host = self.host
        self.vma = host.new("vm_area_struct", vm_start=HVA, vm_end=HVA + GUEST_SIZE)
        host.at = -(-host.at // 0x100) * 0x100
        leaf, top = host.new(""), host.new("")
        host.put(leaf + OFFSETS["maple_range_64.pivot"], struct.pack("<3Q", HVA - 1, HVA + GUEST_SIZE - 1, 0))
        host.put(leaf + OFFSETS["maple_range_64.slot"], struct.pack("<4Q", 0, self.vma, 0, 0))
        host.put(top + OFFSETS["maple_arange_64.pivot"], struct.pack("<2Q", 0xFFFF, 0))
        host.put(top + OFFSETS["maple_arange_64.slot"], struct.pack("<3Q", 0, leaf | 1 << 3 | 4, 0))
        host.set(memory, "mm_struct", mm_mt__ma_root=top | 3 << 3 | 6)

    def _fetch(self, va: int, size: int) -> bytes:
        pa = self.tables.walk(va)
        if pa is None or va >> 47 != (1 << 17) - 1:
            raise NotMapped(va)
        return bytes(self.memory[pa : pa + size])

    def _fetch_user(self, pid: int, va: int, size: int) -> bytes:
        pa = self.user.walk(va)
        if pid != PID or pa is None:
            raise NotMapped(va)
        return bytes(self.memory[pa : pa + size])

    def fill(self, va: int, view: memoryview) -> None:
        view[:] = self._fetch(va, len(view))

    def close(self) -> None:
        pass
