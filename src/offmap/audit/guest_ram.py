"""Where a process keeps its guest's RAM.

Our convention, which any VMM may adopt: the VMM holds open a memfd named ``offmap-memslots`` with the JSON text ::

    {"schema": "offmap-memslots/1",
     "slots": [{"guest_phys_addr": 0, "memory_size": 268435456, "userspace_addr": 140737353940992, "backend": "anon"}],
     "excluded": [[guest_phys_addr, size], ...]}

Auditors find it by its link in /proc/PID/fd; it vanishes with the process. ``excluded`` ranges are kept from the guest
(reserved in its E820 map). The claim says *where* to look and nothing else: ``backend`` is only repeated to the reader.
What KVM has in a memory slot and the claim leaves out is audited too.

Of a VMM that makes no claim, what KVM has in memory slots is taken. Where KVM's list cannot be had, the large writable
mappings are, and called guesses: a guess can show that RAM is exposed, never that it is hidden.
"""

import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from offmap.audit.btf import Unknown
from offmap.audit.kvm_slots import KVM_VM_LINK, KvmSlot, OthersVm
from offmap.audit.process import Mapping as Vma
from offmap.audit.process import Process, find_mapping
from offmap.audit.residency import link as link_of
from offmap.audit.result import Source
from offmap.errors import Undetermined
from offmap.report.typed import Count, Document, Malformed, decode, parse_json
from offmap.uapi.page import PAGE_SIZE

MEMSLOTS_LINK = "/memfd:offmap-memslots (deleted)"
_MEMSLOTS_LIMIT = 1 << 20  # far more than KVM_USER_MEM_SLOTS of them take
_USER_BITS = 56  # 5-level page tables: the user half (Documentation/arch/x86/x86_64/mm.rst)
_PHYSICAL_BITS = 52  # the widest MAXPHYADDR that there is (Intel SDM volume 3, section 4.1.4)
_GUESS_MINIMUM = 16 << 20  # smaller mappings are heaps, stacks and libraries more often than RAM
_GUEST_MEMFD = "[kvm-gmem]"  # virt/kvm/guest_memfd.c, __kvm_gmem_create
KVM_VCPU_LINK = re.compile(r"anon_inode:kvm-vcpu:\d+")


@dataclass(frozen=True)
class RamRange:
    """A range of the process's addresses that is to be audited; page-aligned.

    ``excluded``: guest-physical (address, size) of what the guest does not get, by the claim that named the range.
    Another VM of the process may give its own guest what is at these addresses.
    """

    va: int
    bytes: int
    source: Source
    guest_phys_addr: int | None = None
    backend: str = ""
    excluded: tuple[tuple[int, int], ...] = ()

    @property
    def pages(self) -> int:
        return self.bytes // PAGE_SIZE


@dataclass(frozen=True)
class GuestRam:
    """All ranges of a process that are to be audited.

    Attributes:
        unseen_guest_memfd: the process holds guest_memfd memory that none of the ranges shows. Its pages may be in no
            process's page tables, so nobody can tell where they are.
        read_only_bytes: in slots that the guest cannot write to (ROM), which are not judged.
        why_guessed: why KVM's own list could not be had.
        omitted_bytes: in KVM's slots, and not in the VMM's list.
    """

    ranges: tuple[RamRange, ...]
    unseen_guest_memfd: bool = False
    read_only_bytes: int = 0
    why_guessed: str = field(default="", compare=False)
    omitted_bytes: int = 0

    @property
    def guessed(self) -> bool:
        return any(part.source is Source.GUESS for part in self.ranges)


class _Slot(Document, frozen=True):
    """A memory slot as the VMM's list names it."""

    guest_phys_addr: Count
    memory_size: Count
    userspace_addr: Count
    backend: str = ""


class _Memslots(Document, frozen=True, tag_field="schema", tag="offmap-memslots/1"):
    """The content of an ``offmap-memslots`` memfd."""

    slots: tuple[_Slot, ...]
    excluded: tuple[tuple[Count, Count], ...] = ()


def parse_memslots(text: bytes) -> GuestRam:
    """Parse the content of an ``offmap-memslots`` memfd.

    Raises:
        Undetermined: malformed; nothing is guessed in its place.
    """
    try:
        claim = decode(_Memslots, parse_json(text))
    except Malformed as error:
        raise Undetermined(f"the process's offmap-memslots list is malformed: {error}") from None
    for slot in claim.slots:
        va, guest, size = slot.userspace_addr, slot.guest_phys_addr, slot.memory_size
        fits = va + size <= 1 << _USER_BITS and guest + size <= 1 << _PHYSICAL_BITS
        if not size or (va | size | guest) % PAGE_SIZE or not fits:
            raise Undetermined(f"the process's offmap-memslots list is malformed: {slot!r} is not made of pages")
    if not claim.slots:
        raise Undetermined("the process's offmap-memslots list is empty")
    ranges = (
        RamRange(s.userspace_addr, s.memory_size, Source.MEMSLOT, s.guest_phys_addr, s.backend, claim.excluded)
        for s in claim.slots
    )
    return GuestRam(tuple(ranges))


def guess_ranges(mappings: Sequence[Vma]) -> tuple[RamRange, ...]:
    """The large writable mappings; neighbours with the same backing count as one."""
    merged: list[tuple[int, int, tuple[str, int, str]]] = []
    for mapping in mappings:
        if not mapping.writable:
            continue
        backing = (mapping.device, mapping.inode, mapping.path)
        if merged and merged[-1][1] == mapping.start and merged[-1][2] == backing:
            merged[-1] = (merged[-1][0], mapping.end, backing)
        else:
            merged.append((mapping.start, mapping.end, backing))
    return tuple(
        RamRange(start, end - start, Source.GUESS, backend=backing[2] or "anonymous")
        for start, end, backing in merged
        if end - start >= _GUESS_MINIMUM
    )


# The memory slots of the VMs that a process holds by these descriptors, given with what their links say; raises Unknown
# where they cannot be had.
AskKvm = Callable[[int, Mapping[int, str]], Sequence[KvmSlot]]


def find_guest_ram(process: Process, ask_kvm: AskKvm | None = None) -> GuestRam:
    """Find the guest RAM of a process: what its VMM or KVM says, else guesses for one that holds a VM.

    Args:
        ask_kvm: reads KVM's own list.

    Raises:
        Undetermined: the process holds no VM, or another's beside a claim, has no mapping that could be RAM, or its
            claim is malformed.
    """
    links = process.descriptors()
    claimed = _claimed_ranges(process, links)
    # A VM lives as long as one of its vCPUs is held.
    vms = {n: link for n, link in sorted(links.items()) if link == KVM_VM_LINK or KVM_VCPU_LINK.fullmatch(link)}
    if not vms and not claimed:
        raise Undetermined(
            f"process {process.pid} holds no KVM VM and no offmap-memslots list",
            "say which addresses to audit with --range VA:LENGTH",
        )
    slots: Sequence[KvmSlot] = ()
    why = "KVM was not asked" if vms and not claimed else "the process holds no KVM VM"
    if ask_kvm is not None and vms:
        try:
            slots, why = ask_kvm(process.pid, vms), ""
        except OthersVm as error:
            why = str(error)
            if claimed:
                # A forked child has the claim too, and may have other pages at the addresses that it names.
                raise Undetermined(f"{why}, so that its claim says nothing of it", "audit that process") from None
        except Unknown as error:
            why = str(error)
    mappings = process.maps()  # after the slots, whose memory was there before them
    found = slot_ranges(slots, mappings, claimed)
    guesses = () if found or claimed else guess_ranges(mappings)
    ranges = claimed + found + guesses
    if not ranges:
        raise Undetermined(
            f"process {process.pid} holds a KVM VM but no mapping of {_GUESS_MINIMUM >> 20} MiB or more that could be"
            " its RAM",
            "say which addresses to audit with --range VA:LENGTH",
        )
    files = _guest_memfds(process, links, mappings)
    return GuestRam(
        ranges,
        _unseen_guest_memfd(files, ranges, mappings, () if guesses else slots),
        read_only_bytes=0 if claimed or guesses else sum(slot.bytes for slot in slots if slot.read_only),
        why_guessed=why or ("its VM has no memory yet" if guesses else ""),
        omitted_bytes=sum(part.bytes for part in found) if claimed else 0,
    )


def _claimed_ranges(process: Process, links: Mapping[int, str]) -> tuple[RamRange, ...]:
    """What the VMM's own lists name; nothing if it has none.

    Raises:
        Undetermined: a list is malformed.
    """
    claims: dict[int, GuestRam] = {}  # by inode: a duplicated fd is one claim
    for number in sorted(number for number, link in links.items() if link == MEMSLOTS_LINK):
        # Anything may have that name: a FIFO must not keep us waiting.
        fd = process.open(f"fd/{number}", os.O_RDONLY | os.O_NONBLOCK)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise Undetermined("the process's offmap-memslots list is malformed: it is not a file")
            if status.st_size > _MEMSLOTS_LIMIT:
                raise Undetermined("the process's offmap-memslots list is malformed: it is larger than 1 MiB")
            if status.st_ino not in claims:
                claims[status.st_ino] = parse_memslots(os.pread(fd, _MEMSLOTS_LIMIT, 0))
        finally:
            os.close(fd)
    return tuple(dict.fromkeys(part for claim in claims.values() for part in claim.ranges))


def slot_ranges(
    slots: Sequence[KvmSlot], mappings: Sequence[Vma], known: Sequence[RamRange] = ()
) -> tuple[RamRange, ...]:
    """The memory that the guest can write to, without slots that lie in a larger one or in one of the ``known`` ranges.

    A known range that keeps pages from its guest only covers a slot at the same guest-physical place: through any other
    slot the guest gets them.
    """
    found = list(known)
    for slot in sorted(slots, key=lambda slot: (-slot.bytes, slot.guest_phys_addr)):
        va, end = slot.userspace_addr, slot.userspace_addr + slot.bytes
        if slot.read_only or any(
            part.va <= va
            and end <= part.va + part.bytes
            and (not part.excluded or slot.guest_phys_addr - va == (part.guest_phys_addr or 0) - part.va)
            for part in found
        ):
            continue
        backing = find_mapping(mappings, va)
        name = "" if backing is None else backing.path or "anonymous"
        found.append(RamRange(va, slot.bytes, Source.KVM, slot.guest_phys_addr, name))
    return tuple(sorted(found[len(known) :], key=lambda part: part.guest_phys_addr or 0))


def _guest_memfds(process: Process, links: Mapping[int, str], mappings: Sequence[Vma]) -> dict[tuple[str, int], int]:
    """Bytes of every guest_memfd that is open or mapped (0 if it cannot be asked), by device and inode as in maps."""
    files = {}
    for vma in (vma for vma in mappings if _GUEST_MEMFD in vma.path):
        status = process.stat(link_of(vma))
        files[vma.device, vma.inode] = 0 if status is None else status.st_size
    for number in (number for number, link in links.items() if _GUEST_MEMFD in link):
        status = process.stat(f"fd/{number}")
        if status is None:
            files["", 0] = 0
        else:
            device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
            files[device, status.st_ino] = status.st_size
    return files


def _unseen_guest_memfd(
    files: Mapping[tuple[str, int], int],
    ranges: Iterable[RamRange],
    mappings: Sequence[Vma],
    slots: Iterable[KvmSlot] = (),
) -> bool:
    """Whether a part of a guest_memfd is in none of the ranges. A slot may have one that another process holds."""
    if not files and any(slot.guest_memfd for slot in slots):
        return True
    shown: dict[tuple[str, int], list[tuple[int, int]]] = {file: [] for file in files}
    for part in ranges:
        for vma in mappings:
            start, end = max(vma.start, part.va), min(vma.end, part.va + part.bytes)
            if start < end and (vma.device, vma.inode) in shown:
                offset = vma.offset + start - vma.start
                shown[vma.device, vma.inode].append((offset, offset + end - start))
    for file, size in files.items():
        seen = 0
        for start, end in sorted(shown[file]):
            if start > seen:
                break
            seen = max(seen, end)
        if seen < size or not seen:
            return True
    return False
