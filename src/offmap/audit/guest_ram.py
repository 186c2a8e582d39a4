"""Where a process keeps its guest's RAM.

Our convention, which any VMM may adopt: the VMM holds open a memfd named ``offmap-memslots`` with the JSON text ::

    {"schema": "offmap-memslots/1",
     "slots": [{"guest_phys_addr": 0, "memory_size": 268435456, "userspace_addr": 140737353940992, "backend": "anon"}],
     "excluded": [[guest_phys_addr, size], ...]}

Auditors find it by its link in /proc/PID/fd; it vanishes with the process. ``excluded`` ranges are kept from the guest:
they are in none of its memory slots, which is checked. The claim says *where* to look and nothing else: ``backend`` is
only repeated to the reader.

What counts is what KVM has in the memory slots of the VMs that this address space made. What the claim leaves out is
audited too, and without KVM's list no claim is called hidden. Of a VMM without a claim the large writable mappings are
taken then, and called guesses: a guess can show that RAM is exposed, never that it is hidden.
"""

import os
import re
import stat
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from offmap.audit.btf import Unknown
from offmap.audit.kvm_list import GuestMemfd, KvmList, KvmSlot, Vm
from offmap.audit.process import Mapping as Vma
from offmap.audit.process import Process, find_mapping, mappings_from
from offmap.audit.result import Source
from offmap.audit.status import memfd_device, open_file, status_of
from offmap.errors import Undetermined
from offmap.report.typed import Count, Document, Malformed, decode, parse_json
from offmap.uapi.page import PAGE_SIZE

MEMSLOTS_LINK = "/memfd:offmap-memslots (deleted)"
_MEMSLOTS_LIMIT = 1 << 20  # far more than KVM_USER_MEM_SLOTS of them take
_ATTEMPTS = 4
_USER_BITS = 56  # 5-level page tables: the user half (Documentation/arch/x86/x86_64/mm.rst)
_PHYSICAL_BITS = 52  # the widest MAXPHYADDR that there is (Intel SDM volume 3, section 4.1.4)
_GUESS_MINIMUM = 16 << 20  # smaller mappings are heaps, stacks and libraries more often than RAM
KVM_VM_LINK = "anon_inode:kvm-vm"
KVM_VCPU_LINK = re.compile(r"anon_inode:kvm-vcpu:\d+")


@dataclass(frozen=True)
class RamRange:
    """A range of the process's addresses that is to be audited; page-aligned.

    ``excluded``: guest-physical (address, size) of what the guest does not get, by the claim that named the range. It
    counts where KVM's slots agree (``classify.excluded_ranges``).

    ``guest_memfd``: the pages are in that file, and ``va`` is only where the slot says that they are for the VMM.
    """

    va: int
    bytes: int
    source: Source
    guest_phys_addr: int | None = None
    backend: str = ""
    excluded: tuple[tuple[int, int], ...] = ()
    guest_memfd: GuestMemfd | None = None

    @property
    def pages(self) -> int:
        return self.bytes // PAGE_SIZE


@dataclass(frozen=True)
class GuestRam:
    """All ranges of a process that are to be audited.

    Attributes:
        vms: the VMs that the process made, as KVM has them.
        read_only: in slots that the guest cannot write to (ROM, registers), and in no other.
        unlisted: why KVM's own list could not be had: then nothing is called hidden.
        why_unchecked: why the claim was not compared with KVM's slots, though that list could be had.
        omitted_bytes: in KVM's slots, and not in the VMM's list.
    """

    ranges: tuple[RamRange, ...]
    vms: tuple[Vm, ...] = field(default=(), compare=False)
    read_only: tuple[RamRange, ...] = ()
    unlisted: str = field(default="", compare=False)
    why_unchecked: str = field(default="", compare=False)
    omitted_bytes: int = 0

    @property
    def doubts(self) -> tuple[str, ...]:
        """What KVM's own structures say against its being hidden."""
        return tuple(dict.fromkeys(doubt for vm in self.vms for doubt in vm.doubts))

    @property
    def clock_pages(self) -> tuple[int, ...]:
        """Guest-physical addresses of the pages at which KVM keeps kvm-clock."""
        return tuple(sorted({clock & -PAGE_SIZE for vm in self.vms for clock in vm.clocks}))

    @property
    def intact(self) -> bool:
        """Whether no slot of its VMs was ever taken away or changed."""
        return all(vm.intact for vm in self.vms)

    def replaced_since(self, moment: int) -> bool:
        """Whether a slot may have been replaced by another one since this moment (CLOCK_MONOTONIC, nanoseconds)."""
        return any(not vm.intact and vm.changed >= moment for vm in self.vms)

    def made_since(self, moment: int) -> bool:
        """Whether one of its VMs may have been made since this moment (CLOCK_MONOTONIC, nanoseconds)."""
        return any(vm.made_since(moment) for vm in self.vms)

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


class OthersVm(Unknown):
    """The VM is of another process's memory: its userspace addresses say nothing in this one."""


class NoVm(Undetermined):
    """By KVM's own list, and all that can be seen of it, the process has no VM now."""


# The VMs that a process made, given with what its descriptors' links say; raises Unknown where they cannot be had.
AskKvm = Callable[[Process, Mapping[int, str]], Sequence[Vm]]


def vm_links(links: Mapping[int, str]) -> dict[int, str]:
    """Those of a process's descriptors that keep a VM: its own, and those of its vCPUs."""
    return {n: link for n, link in sorted(links.items()) if link == KVM_VM_LINK or KVM_VCPU_LINK.fullmatch(link)}


def ask_kvm_list(kvm: KvmList, process: Process, links: Mapping[int, str]) -> Sequence[Vm]:
    """The VMs that a process made, by KVM's own list; its descriptors can only show that the list is wrong.

    Raises:
        Unknown: the list cannot be read or lacks a VM that the process holds; OthersVm: it holds another's only.
    """
    vms = kvm.of_memory(kvm.memory_of(process.pid))
    held = vm_links(links)
    if not held:
        return vms
    for attempt in range(_ATTEMPTS):
        try:
            unknown = kvm.held(process.pid, held) - {vm.address for vm in vms}
            if not unknown or unknown <= set(kvm.addresses()):
                break
        except Unknown:
            if attempt == _ATTEMPTS - 1:
                raise
        held = vm_links(process.descriptors())  # one was closed meanwhile
    else:
        raise Unknown("the process holds a VM that KVM does not list")
    if not vms:
        raise OthersVm(f"the VM of process {process.pid} was made by another")
    return vms


def find_guest_ram(process: Process, ask_kvm: AskKvm | None = None) -> GuestRam:
    """Find the guest RAM of a process: what KVM or its VMM says, else guesses for one that holds a VM.

    Args:
        ask_kvm: reads KVM's own list.

    Raises:
        Undetermined: the process has no VM, or another's beside a claim, has no mapping that could be RAM, or its
            claim is malformed.
    """
    links = process.descriptors()
    claimed = claimed_ranges(process, links)
    vms: Sequence[Vm] = ()
    unlisted, others = "KVM was not asked", ""
    if ask_kvm is not None:
        try:
            vms, unlisted = ask_kvm(process, links), ""
        except OthersVm as error:
            unlisted, others = "", str(error)
            if claimed:
                # A forked child has the claim too, and may have other pages at the addresses that it names.
                raise Undetermined(f"{others}, so that its claim says nothing of it", "audit that process") from None
        except Unknown as error:
            unlisted = str(error)
    if not vms and not claimed and not vm_links(links):
        raise (Undetermined if unlisted else NoVm)(
            f"process {process.pid} holds no KVM VM and no offmap-memslots list",
            "say which addresses to audit with --range VA:LENGTH",
        )
    mappings = process.maps()  # after the slots, whose memory was there before them
    slots = tuple(dict.fromkeys(slot for vm in vms for slot in vm.slots))
    claimed, found = slot_ranges(slots, mappings, claimed)
    guesses = () if found or claimed else guess_ranges(mappings)
    ranges = claimed + found + guesses
    if not ranges:
        raise Undetermined(
            f"process {process.pid} holds a KVM VM but no mapping of {_GUESS_MINIMUM >> 20} MiB or more that could be"
            " its RAM",
            "say which addresses to audit with --range VA:LENGTH",
        )
    return GuestRam(
        ranges,
        tuple(vms),
        read_only=() if guesses else read_only_ranges(slots, mappings, ranges),
        unlisted=unlisted or others or ("its VM has no memory yet" if guesses else ""),
        why_unchecked="" if vms or unlisted else "the process has no KVM VM",
        omitted_bytes=sum(part.bytes for part in found) if claimed else 0,
    )


def claimed_ranges(process: Process, links: Mapping[int, str] | None = None) -> tuple[RamRange, ...]:
    """What the VMM's own lists name; nothing if it has none. Raises Undetermined: a list is malformed."""
    claims: dict[int, GuestRam] = {}  # by inode: a duplicated fd is one claim
    links = process.descriptors() if links is None else links
    for number in sorted(number for number, link in links.items() if link == MEMSLOTS_LINK):
        place = process.open(f"fd/{number}", os.O_PATH)
        try:
            # Anything may have that name: a FIFO, or a file that never answers, must not keep us waiting.
            status = status_of(open_file(place))
            if status is None or status.st_dev != memfd_device() or not stat.S_ISREG(status.st_mode):
                raise Undetermined("the process's offmap-memslots list is malformed: it is no memfd")
            if status.st_ino not in claims:
                claims[status.st_ino] = parse_memslots(_content(place))
        finally:
            os.close(place)
    return tuple(dict.fromkeys(part for claim in claims.values() for part in claim.ranges))


def _content(place: int) -> bytes:
    """What the file of an O_PATH descriptor holds. Raises Undetermined: more than any list, or it cannot be read."""
    try:
        with open(open_file(place), "rb") as file:  # noqa: PTH123 - not a path of anything
            content = file.read(_MEMSLOTS_LIMIT + 1)
    except OSError as error:
        raise Undetermined(f"the process's offmap-memslots list cannot be read: {error.strerror}") from None
    if len(content) > _MEMSLOTS_LIMIT:
        raise Undetermined("the process's offmap-memslots list is malformed: it is larger than 1 MiB")
    return content


def named_ranges(pid: int) -> list[RamRange]:
    """The RAM that the VMM's own lists name, as if it had been given by ``--range``: for callers that trust the VMM."""
    with Process(pid) as process:
        return [replace(part, source=Source.REQUESTED) for part in claimed_ranges(process)]


def slot_ranges(
    slots: Sequence[KvmSlot], mappings: Sequence[Vma], known: Sequence[RamRange] = ()
) -> tuple[tuple[RamRange, ...], tuple[RamRange, ...]]:
    """The known ranges, and the memory beside them that the guest can write to.

    A slot that lies in a larger one or in one of the ``known`` ranges is left out. Pages of a guest_memfd are a range
    of their own, unless just these pages are what the VMM has mapped there.
    """
    found, covers = list(known), _Covers(known)
    places: dict[tuple[int, int], int] = {}
    for index, part in enumerate(found):
        places.setdefault((part.va, part.bytes), index)

    def add(part: RamRange) -> None:
        places.setdefault((part.va, part.bytes), len(found))
        found.append(part)
        covers.add(part)

    for slot in sorted(slots, key=lambda slot: (-slot.bytes, slot.guest_phys_addr)):
        file = slot.guest_memfd
        if file is not None and file.file:
            inside = _maps_guest_memfd(mappings, slot, file)
            part = RamRange(slot.userspace_addr, slot.bytes, Source.KVM, slot.guest_phys_addr, "guest_memfd", (), file)
            same = places.get((part.va, part.bytes)) if inside else None
            if same is not None:
                # The claim names just this memory.
                covers.drop(found[same])
                found[same] = replace(found[same], guest_memfd=file)
                continue
            add(part)
            if inside:
                continue
        if not slot.read_only and not covers.has(slot):
            add(_range_of(slot, mappings))
    added = sorted(found[len(known) :], key=lambda part: part.guest_phys_addr or 0)
    return tuple(found[: len(known)]), tuple(added)


def read_only_ranges(
    slots: Sequence[KvmSlot], mappings: Sequence[Vma], ranges: Sequence[RamRange]
) -> tuple[RamRange, ...]:
    """The memory that the guest can only read, and that is in none of the ranges."""
    covers = _Covers(ranges)
    found = [_range_of(slot, mappings) for slot in slots if slot.read_only and not covers.has(slot)]
    return tuple(dict.fromkeys(found))


def _range_of(slot: KvmSlot, mappings: Sequence[Vma]) -> RamRange:
    backing = find_mapping(mappings, slot.userspace_addr)
    name = "" if backing is None else backing.path or "anonymous"
    return RamRange(slot.userspace_addr, slot.bytes, Source.KVM, slot.guest_phys_addr, name)


class _Covers:
    """The ranges that a slot may lie in, each in none of the others; those of a guest_memfd are other memory.

    A VMM may have 32,764 slots in each VM: a slot is not compared with each of them.
    """

    def __init__(self, ranges: Iterable[RamRange]) -> None:
        self._starts: list[int] = []  # both ascend, as none lies in another
        self._ends: list[int] = []
        for part in ranges:
            self.add(part)

    def has(self, slot: KvmSlot) -> bool:
        return self._hold(slot.userspace_addr, slot.userspace_addr + slot.bytes)

    def _hold(self, start: int, end: int) -> bool:
        at = bisect_right(self._starts, start) - 1
        return at >= 0 and end <= self._ends[at]

    def add(self, part: RamRange) -> None:
        start, end = part.va, part.va + part.bytes
        if part.guest_memfd is not None or self._hold(start, end):
            return
        first, last = bisect_left(self._starts, start), bisect_right(self._ends, end)
        self._starts[first:last], self._ends[first:last] = [start], [end]

    def drop(self, part: RamRange) -> None:
        """Take one away. What lies in it then counts by itself, whatever else it lies in."""
        at = bisect_left(self._starts, part.va)
        if at < len(self._starts) and (self._starts[at], self._ends[at]) == (part.va, part.va + part.bytes):
            del self._starts[at], self._ends[at]


def _maps_guest_memfd(mappings: Sequence[Vma], slot: KvmSlot, file: GuestMemfd) -> bool:
    """Whether the VMM has mapped, at the slot's address, just the slot's part of its guest_memfd."""
    at, end = slot.userspace_addr, slot.userspace_addr + slot.bytes
    for vma in mappings_from(mappings, at):
        # Not by its name and inode number: any file can have these.
        if vma.start > at or (vma.device, vma.inode) != (file.device, file.inode):
            return False
        if vma.offset + at - vma.start != file.offset + at - slot.userspace_addr:
            return False
        at = vma.end
        if at >= end:
            return True
    return False
