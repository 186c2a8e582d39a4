"""What the attacker knows of a kernel beforehand: where its build has symbols, and members of structures.

All of it stands in the files that a distribution publishes: the image and its modules. ``learn`` reads these files.
What is known can be written to a file, and read and changed there: an attack uses nothing else of a kernel's build. A
missing entry is an error (``Unknown``), never a guess.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from offmap.attack.image import sections_of
from offmap.attack.kallsyms import read_symbols
from offmap.audit.btf import Btf, Unknown
from offmap.errors import KernelError, OffmapError
from offmap.report.typed import Address, Count, Document, Malformed, decode, parse_json

SYMBOLS = frozenset(
    {"_text", "init_task", "linux_banner", "page_offset_base", "vmemmap_base", "init_top_pgt", "swapper_pg_dir"}
    | {"phys_base", "sme_me_mask", "super_blocks"}
)
_MEMBERS = """
task_struct tasks; task_struct pid; task_struct comm; task_struct mm; task_struct files; task_struct fs
task_struct real_parent; task_struct stack
mm_struct pgd; mm_struct start_brk; mm_struct brk; mm_struct start_stack; mm_struct start_code; mm_struct end_data
files_struct fdt; fdtable fd; fdtable max_fds; file f_path dentry; file private_data; file f_inode; file f_mapping
dentry d_name name; dentry d_parent; dentry d_inode; dentry d_children; dentry d_sib; dentry d_subdirs; dentry d_child
fs_struct root dentry; inode i_mapping; inode i_size; inode i_ino
mm_struct mm_mt ma_root; maple_range_64 pivot; maple_range_64 slot; maple_arange_64 pivot; maple_arange_64 slot
vm_area_struct vm_start; vm_area_struct vm_end; vm_area_struct vm_flags; vm_area_struct vm_file
inode i_sb; super_block s_magic; super_block s_type; super_block s_root; super_block s_list; file_system_type name
address_space i_pages; address_space host; address_space nrpages
xarray xa_head; xa_node shift; xa_node parent; xa_node array; xa_node slots
kvm mm; kvm vm_list; kvm memslots; kvm nr_memslot_pages; kvm stats_id; kvm vcpu_array; kvm online_vcpus
kvm_memslots id_hash; kvm_memslots node_idx; kvm_memslots generation
kvm_memory_slot id_node; kvm_memory_slot base_gfn; kvm_memory_slot npages; kvm_memory_slot userspace_addr
kvm_memory_slot flags; kvm_memory_slot id; kvm_memory_slot gmem file; kvm_memory_slot gmem pgoff
kvm_vcpu kvm; kvm_vcpu arch regs; kvm_vcpu arch cr3; kvm_vcpu run
kvm_vcpu arch pio_data
kvm_vcpu arch root_mmu root hpa; kvm_vcpu arch root_mmu root_role word
kvm_vcpu arch guest_fpu fpstate; fpstate size; fpstate regs
"""
_ARRAYS = """
maple_range_64 pivot; maple_arange_64 pivot; kvm memslots; kvm_memslots id_hash; kvm_memory_slot id_node; xa_node slots
kvm_vcpu arch regs
"""
_SIZES = ("page", "xa_node", "kvm", "kvm_vcpu")
_LARGEST = 16 << 20


class Kernel(Document, frozen=True, kw_only=True):
    """What is known of one build of the kernel.

    Attributes:
        schema: Names the form of this document.
        banner: What the kernel says of its version (linux_banner), without the newline at its end.
        symbols: Link-time addresses; KASLR moves all of them by the same amount.
        offsets: Byte offsets of members of structures, as "struct.member.member".
        sizes: Bytes of structures.
        arrays: How many elements members have that are arrays.
    """

    schema: Annotated[Literal["offmap-kernel/1"], Meta(description="Names the form of this document.")] = (
        "offmap-kernel/1"
    )
    banner: str
    symbols: dict[str, Address]
    offsets: dict[str, Count]
    sizes: dict[str, Count]
    arrays: dict[str, Count]

    def symbol(self, name: str) -> int:
        """Link-time address."""
        return self._of(self.symbols, name, "symbol")

    def offset(self, name: str, *members: str) -> int:
        """Byte offset of a member of ``struct name``."""
        return self._of(self.offsets, ".".join((name, *members)), "member")

    def size(self, name: str) -> int:
        """Bytes of a structure."""
        return self._of(self.sizes, name, "structure")

    def elements(self, name: str, *members: str) -> int:
        """How many elements a member has."""
        return self._of(self.arrays, ".".join((name, *members)), "array")

    def _of(self, found: "dict[str, int] | dict[str, Address]", name: str, what: str) -> int:
        if name not in found:
            raise Unknown(f"nothing is known of the {what} {name} of this kernel")
        return int(found[name])


def has_btf(image: Path) -> bool:
    """Whether a kernel's image says what its structures are like; raises as ``learn``."""
    return ".BTF" in sections_of(image)


def learn(image: Path, modules: Sequence[Path] = (), types: Path | None = None) -> Kernel:
    """What the files of a kernel's package say of it.

    Args:
        image: its vmlinuz or vmlinux.
        modules: modules whose structures are of use, each by itself: kvm.ko where KVM is one.
        types: an object that was compiled with its headers (kernel/types), for an image without BTF.

    Raises:
        OffmapError: a file cannot be used.
    """
    sections = sections_of(image)
    described = sections if types is None else sections_of(types)
    try:
        rodata, data = sections[".rodata"], described[".BTF"].data
    except KeyError as error:
        what, remedy = f"{image} has no section {error.args[0]}", "give a kernel built with BTF, or --types"
        raise OffmapError(what, remedy) from None
    try:
        symbols = read_symbols(rodata.data, rodata.va, SYMBOLS)
        first = Btf(data)
        all_types = [first, *(first.with_module(_btf_of(path)) for path in modules)]
    except Unknown as error:
        raise OffmapError(f"{image} cannot be learnt from: {error}", "give a kernel with kallsyms and BTF") from None
    start = symbols.get("linux_banner", 0) - rodata.va
    banner = rodata.data[start:].split(b"\0", 1)[0] if 0 < start < len(rodata.data) else b""
    if not banner.startswith(b"Linux version "):
        raise OffmapError(f"{image} does not say its version where it should", "report this as a bug")
    offsets: dict[str, int] = {}
    arrays: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for known in all_types:
        with suppress(Unknown):
            sizes |= {name: known.size(name) for name in _SIZES if name not in sizes and _has(known, name)}
        for path in _paths(_MEMBERS):
            with suppress(Unknown):
                offsets.setdefault(".".join(path), known.offset(*path))
        for path in _paths(_ARRAYS):
            with suppress(Unknown):
                arrays.setdefault(".".join(path), known.elements(*path))
    return Kernel(
        banner=banner.decode("ascii", "replace").strip(),
        symbols={name: Address(at) for name, at in symbols.items()},
        offsets=offsets,
        sizes=sizes,
        arrays=arrays,
    )


def known(path: Path, modules: Sequence[Path] = (), types: Path | None = None) -> Kernel:
    """What a file says: one that an earlier ``learn`` was written to, else a kernel's image and these other files.

    Raises:
        OffmapError: it cannot be used.
    """
    try:
        with path.open("rb") as file:
            head = file.read(1)
            text = head + file.read(_LARGEST) if head == b"{" else b""
    except OSError as error:
        raise KernelError(f"reading {path}", error, "name a kernel's image, or what --learn wrote") from None
    if not text:
        return learn(path, modules, types)
    try:
        return decode(Kernel, parse_json(text))
    except Malformed as error:
        raise OffmapError(f"{path} does not describe a kernel: {error}", "make it anew with --learn") from None


def _btf_of(path: Path) -> bytes:
    if path.parent == Path("/sys/kernel/btf"):
        return path.read_bytes()
    section = sections_of(path).get(".BTF")
    if section is None:
        raise Unknown(f"{path} has no section .BTF")
    return section.data


def _has(types: Btf, name: str) -> bool:
    with suppress(Unknown):
        types.size(name)
        return True
    return False


def _paths(text: str) -> list[tuple[str, str]]:
    return [tuple(each.split()) for line in text.splitlines() for each in line.split(";") if each.strip()]  # type: ignore[misc]
