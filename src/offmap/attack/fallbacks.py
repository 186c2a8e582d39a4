"""What is tried when a page that the chain needs is hidden: other mappings of the guest's RAM, and copies elsewhere.

"Ends" is said only if all of it was tried, and nothing was found.
"""

from contextlib import suppress
from functools import cached_property

import numpy as np

from offmap.attack.host import Host
from offmap.attack.linux import Lost, Process
from offmap.attack.page_cache import pages_of
from offmap.attack.primitive import NotMapped, Unreadable
from offmap.attack.residue import Copies, copies_of_kvm, copies_of_vmm, page_cache_residue
from offmap.attack.result import Residue
from offmap.attack.seeker import Seeker
from offmap.attack.stages import Stages
from offmap.attack.target import Target
from offmap.attack.vm import GuestMemory, Pages, nested_place, nested_roots
from offmap.audit.btf import Unknown
from offmap.audit.mappings import KernelMappings
from offmap.uapi.page import PAGE_SHIFT, PAGE_SIZE

ALIASES = "other mappings of the guest's pages"
_ATTEMPTS = 8


class Fallbacks:
    """The fallbacks for one VM.

    Args:
        host: as far as it is known.
        stages: where the steps are noted.
        vmm: the VMM's process.
        kvm: address of its ``struct kvm``.
        memory: the guest's.
        target: what the attack is after.

    Attributes:
        mappings: all of the host kernel's; None before they were looked for.
        doubtful: pages of guest RAM that may be anywhere.
        count: pages of the guest's in the host, of these mapped, and pages that the VMM's page tables have not.
    """

    def __init__(self, host: Host, stages: Stages, vmm: Process, kvm: int, memory: GuestMemory, target: Target) -> None:
        self._host, self._stages, self._vmm, self._kvm = host, stages, vmm, kvm
        self._memory, self._target = memory, target
        self.mappings: KernelMappings | None = None
        self._pages: Pages | None = None
        self._searched: list[Residue] = []
        self.doubtful = 0
        self.count: tuple[int | None, int | None, int | None] = None, None, None

    def check_place(self, gpa: int, pa: int) -> None:
        """The page must be the guest's for sure: KVM's own page tables must not lead elsewhere."""
        with self._stages.step("host: nested page tables") as stage:
            place = nested_place(self._host, self._kvm, gpa)
            if place is None:
                stage.found = "they do not have the page now"
            elif place >> PAGE_SHIFT != pa >> PAGE_SHIFT:
                raise Lost(f"they lead to host page {place:#x}, and the VMM's to {pa:#x}")
            else:
                stage.found = "they lead to the same host page"

    def find_aliases(self) -> int:
        """How many of the guest's pages any kernel mapping has; they are read by these mappings from now on."""
        with self._stages.step(ALIASES) as stage:
            pages, mappings = self._settled()
            if not pages.nested:
                raise Lost("KVM's own page tables have none of the guest's pages: that these are its is not sure")
            total, mapped = self._memory.use_aliases(mappings, pages)
            self.count, self.doubtful = (total, mapped, pages.missing), pages.doubtful
            self.mappings, self._pages = mappings, pages
            tables = sum(mappings.tables.values())
            stage.found = f"{mapped} of {total} pages, by {tables} page tables of the host"
            stage.found += f"; KVM's own page tables have {pages.nested} of them, and no others"
        return mapped

    def _settled(self) -> tuple[Pages, KernelMappings]:
        """The guest's pages, and mappings that were looked for while these were all that it had.

        Raises:
            Lost: it kept changing, or what maps its pages cannot be told.
        """
        before = self._look()
        for _ in range(_ATTEMPTS):
            mappings = self._host.mappings(self._memory.table)
            if mappings.unreadable:
                raise Lost(f"page tables of the host cannot be read: {mappings.unreadable[0].reason}")
            after = self._look()
            if not before.astray and not after.astray and np.isin(after.host, before.host).all():
                return after, mappings
            before = after
        if before.astray:
            raise Lost(f"KVM's own page tables lead elsewhere than the VMM's for {before.astray} pages")
        raise Lost("the guest's memory kept changing while its mappings were looked for")

    def _look(self) -> Pages:
        return self._memory.pages(nested_roots(self._host, self._kvm))

    @cached_property
    def _of_kvm(self) -> list[Copies]:
        return list(copies_of_kvm(self._host, self._kvm))

    def search_mapped(self) -> str:
        """Where the secret stands in those pages of the guest's that are mapped; empty if it does not."""
        with self._stages.step_to_the_end("guest: pages that are mapped") as stage:
            seeker = Seeker(self._target, anywhere=True)
            for gpa, data in self._memory.mapped():
                at = seeker.look(gpa, data)
                if at is not None:
                    stage.found = f"the secret, at guest address {at:#x}"
                    return stage.found
            if seeker.joined():
                stage.found = "the secret, in two of them"
                return stage.found
            stage.found = "the secret is in none of them"
        return ""

    def search_page_cache(self) -> str:
        """Where the secret stands in the host's page cache of the VMM's files (a drive); empty if it does not."""
        assert self.mappings is not None
        with self._stages.step("host: page cache of the VMM's files") as stage:
            looked = 0
            files = [
                (name, list(pages_of(self._host, mapping))) for name, mapping in self._host.cached_files(self._vmm)
            ]
            self._searched += page_cache_residue(files, self.mappings)
            for name, cached in files:
                seeker = Seeker(self._target)
                contents = self._host.mapped_pages([pa for _, pa in cached])
                for (number, _), data in zip(cached, contents, strict=True):
                    if data is None:
                        continue  # guest RAM that is hidden
                    looked += 1
                    at = seeker.look(number * PAGE_SIZE, data)
                    if at is not None:
                        stage.found = f"the secret, in {name} at {at:#x}"
                        return stage.found
            stage.found = f"the secret is in none of their {looked} pages"
        return ""

    def search_kvm(self) -> str:
        """Where the secret stands in what KVM keeps of the guest; empty if it does not."""
        with self._stages.step("host: registers and kvm_run of the vCPUs") as stage:
            looked = 0
            for copies in self._of_kvm:
                looked += copies.residue.bytes
                if found := self._search(copies):
                    stage.found = found
                    return found
            stage.found = f"the secret is not in their {looked:,} bytes"
        return ""

    def search_vmm(self) -> str:
        """Where the secret stands in the VMM's own memory, as the direct map has it; empty if it does not."""
        assert self._pages is not None and self.mappings is not None
        with self._stages.step("host: memory of the VMM's own") as stage:
            copies = copies_of_vmm(self._host, self._memory, self._pages, self.mappings)
            self._searched += [copies.residue] if copies.residue.bytes else []
            if found := self._search(copies):
                stage.found = found
                return found
            stage.found = f"the secret is in none of its {copies.residue.bytes // PAGE_SIZE} pages"
        return ""

    def _search(self, copies: Copies) -> str:
        seeker = Seeker(self._target)
        for place, data in copies.parts():
            at = seeker.look(place, data)
            if at is not None:
                return f"the secret, in {copies.residue.name} at {at:#x}"
        return ""

    def residues(self) -> tuple[Residue, ...]:
        """What is read of the guest all the same, as far as it can be told: of caches and VMM if searched."""
        found: list[Residue] = []
        with suppress(Lost, Unknown, NotMapped, Unreadable):
            found += (copies.residue for copies in self._of_kvm)
        return (*found, *self._searched)
