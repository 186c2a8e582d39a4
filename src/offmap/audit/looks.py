"""What an audit asks of KVM and of the process besides its frames, before the walks and after them."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from offmap.audit.btf import Unknown
from offmap.audit.classify import Classified, classify, excluded_ranges
from offmap.audit.frames import GuestMemfdPages, resolve
from offmap.audit.guest_ram import AskKvm, GuestRam, OthersVm, RamRange
from offmap.audit.kcore import Kcore
from offmap.audit.kvm_list import KvmList, KvmSlot, Vm
from offmap.audit.kvm_moment import Moment
from offmap.audit.mappings import KernelMappings
from offmap.audit.process import Process, ProcessEnded
from offmap.audit.reach import Sharing
from offmap.audit.regions import Layout
from offmap.audit.seen import SeenVm, exchanged
from offmap.audit.sharers import sharing_of
from offmap.errors import Undetermined


def kvm_list_of(kcore: Kcore, layout: Layout) -> tuple[KvmList | None, str]:
    """KVM's list of VMs, or why it cannot be read here."""
    try:
        return KvmList(kcore, layout), ""
    except Unknown as error:
        return None, str(error)


def moment_of(kvm: KvmList | None, processes: int) -> Moment | None:
    """What KVM's list says now, read once for several processes; None where each is to be read by itself."""
    if kvm is None or processes < 2:
        return None
    try:
        return Moment(kvm)
    except Unknown:  # one VM that cannot be read spoils its own verdict only
        return None


def vms_under(ranges: Sequence[RamRange], process: Process, ask_kvm: AskKvm) -> tuple[tuple[Vm, ...], str]:
    """The process's VMs that have a slot in these ranges, and why there may be more."""
    try:
        vms = ask_kvm(process, process.descriptors())
    except OthersVm:
        return (), ""
    except (Unknown, Undetermined) as error:
        return (), str(error)

    def overlap(slot: KvmSlot, part: RamRange) -> bool:
        return slot.userspace_addr < part.va + part.bytes and part.va < slot.userspace_addr + slot.bytes

    return tuple(vm for vm in vms if any(overlap(slot, part) for slot in vm.slots for part in ranges)), ""


def look_again(
    process: Process, ram: GuestRam, kvm: KvmList | None, find: Callable[[], GuestRam]
) -> tuple[GuestRam, bool, str]:
    """What KVM says at the end too, whether the slots or the memory under them changed, and how the process ended.

    Args:
        find: what found the RAM at the beginning.
    """
    try:
        process.check_alive()
        if ram.guessed:
            return ram, False, ""
        moved = kvm is not None and any(kvm.changed(vm) for vm in ram.vms)
        again = find()
        if len({vm.memory for vm in (*ram.vms, *again.vms)}) > 1:
            # Whoever shares the first address space (CLONE_VM) keeps it, so that its pagemap did not end.
            raise ProcessEnded(f"process {process.pid} replaced its program during the audit")
        found = replace(ram, vms=(*ram.vms, *again.vms), unlisted=ram.unlisted or again.unlisted)
        return found, moved or again != ram, ""
    except ProcessEnded as ended:
        return ram, False, ended.reason


def what_changed(
    ram: GuestRam, seen: Sequence[SeenVm], since: int, *, moved: bool, made: bool, named: bool
) -> tuple[str, ...]:
    """Why other memory than what was judged may have been the guest's before.

    Args:
        seen: what an earlier audit saw of the VMs.
        since: when the auditor was started (CLOCK_MONOTONIC, nanoseconds).
        moved: what ``look_again`` saw.
        made: a VM was made since the auditor was started, and another one may have ended.
        named: the ranges were named. What is named is the same memory, whichever slot has it.
    """
    reasons = {
        "the process changed its memory slots, or the memory under them, during the audit; run it again": moved,
        "memory slots were changed, or devices added, since the audit was started; run it again": (
            not named and ram.replaced_since(since)
        ),
        "a VM of it was made since the audit was started, and may stand in for one that ended; run it again": (
            made and not named
        ),
        "memory under the slots of its VM was unmapped or moved before the audit, and KVM does not say when; what an "
        "audit keeps (--remember FILE) tells the next one": not moved and exchanged(ram.vms, seen),
    }
    return tuple(reason for reason, applies in reasons.items() if applies)


def mapped_read_only(
    process: Process, ram: GuestRam, kcore: Kcore, mappings: KernelMappings, guest_memfd: GuestMemfdPages | None
) -> int:
    """How many pages that the guest can only read are mapped, or may be."""
    if not ram.read_only:
        return 0
    frames = resolve(process, ram.read_only, kcore.page_flags, guest_memfd)
    pages = classify(frames, frames, excluded_ranges(GuestRam(())), mappings).counts()
    return pages.ram_pages - pages.pages_populated + pages.mapped_pages


def shared_with(
    process: Process, ram: GuestRam, judged: Classified, kcore: Kcore, named: bool, ended: str
) -> tuple[Sharing | None, tuple[str, ...]]:
    """Who else maps the pages, and a note if that cannot be told."""
    if ended:
        return None, ()
    try:
        return sharing_of(process, ram, judged, kcore.ram, named=named), ()
    except Undetermined as error:
        return None, (f"whether other processes map these pages too cannot be told: {error}",)
