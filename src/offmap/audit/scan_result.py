"""The words of a result for a scan: where a secret was read, and what the pages there are."""

from enum import StrEnum
from typing import Annotated, Literal

import msgspec

from offmap.report.typed import Address, Count, Document, Seconds, one_of


class Sort(StrEnum):
    """What a page is."""

    GUEST = "guest"  # the audited VM's own
    PAGE_CACHE = "page_cache"  # of a file, tmpfs and memfd included
    PROCESS = "process"  # a process's own (anonymous) memory
    SLAB = "slab"
    KERNEL_STACK = "kernel_stack"
    VMALLOC = "vmalloc"
    PAGE_TABLE = "page_table"
    KERNEL_IMAGE = "kernel_image"
    RESERVED = "reserved"  # never given to the page allocator: firmware's, or the kernel's from its boot
    FREE = "free"  # freed, and not given to anyone since
    KERNEL = "kernel"  # the kernel's own, for no known purpose (network and pipe buffers, drivers)
    GONE = "gone"  # the secret was not there any more at a second look


_FOR_PEOPLE: dict[str, str] = {
    Sort.GUEST: "the VM's own page",
    Sort.PROCESS: "process memory",
    Sort.FREE: "free page",
    Sort.KERNEL: "kernel page",
    Sort.RESERVED: "reserved page",
    Sort.GONE: "gone at a second look",
}
_MOST_NAMES = 4


class PageProcess(Document, frozen=True):
    """A process that has a page in its page tables.

    Attributes:
        pid: Its PID.
        process: Its command name.
        va: Where it has the page.
    """

    pid: Count
    process: str
    va: Address


class Owner(Document, frozen=True):
    """What a page is, and whose.

    Attributes:
        sort: What the page is; gone: something else stood there at a second look.
        name: The file, the slab cache or the thread; empty where there is none or it cannot be told.
        file_offset: Where in the file, in bytes.
        processes: Those that have it in their page tables; empty for the guest's own page.
        guest_phys_addr: Where the guest has it, if it is the guest's own page and the VMM has told.
        userspace_addr: Where the VMM has it, if it is the guest's own page.
    """

    sort: Annotated[str, one_of(Sort)]
    name: str = ""
    file_offset: Count | None = None
    processes: tuple[PageProcess, ...] = ()
    guest_phys_addr: Address | None = None
    userspace_addr: Address | None = None

    def at(self, offset: int) -> "Owner":
        """What this says of the page, of a byte within it."""
        file, guest, user = self.file_offset, self.guest_phys_addr, self.userspace_addr
        return msgspec.structs.replace(
            self,
            file_offset=None if file is None else file + offset,
            guest_phys_addr=None if guest is None else Address(guest + offset),
            userspace_addr=None if user is None else Address(user + offset),
        )

    def __str__(self) -> str:
        words = _FOR_PEOPLE.get(self.sort, self.sort.replace("_", " "))
        if self.guest_phys_addr is not None:
            words += f" at guest-physical {self.guest_phys_addr:#x}"
        elif self.userspace_addr is not None:
            words += f" at {self.userspace_addr:#x} of the process"
        if self.name:
            words += f" of {self.name}"
        if self.file_offset is not None:
            words += f", byte {self.file_offset:#x}"
        if self.processes:
            words += ", in " + ", ".join(f"{each.process} ({each.pid})" for each in self.processes[:_MOST_NAMES])
            words += " and others" if len(self.processes) > _MOST_NAMES else ""
        return words


class Place(Document, frozen=True, kw_only=True):
    """Where a secret was read.

    Attributes:
        va: Kernel virtual address of its first byte.
        pa: Physical address of its first byte.
        region: Region of the kernel's addresses, as Documentation/arch/x86/x86_64/mm.rst names it.
        in_guest: Whether the page is the audited guest's own.
        owner: What the page is, and whose.
        pa2: Where it goes on, if it crosses into a page that only the guest sees next to it; else null.
        source: Whether it is the file that the secret was read from, so that it is no finding.
    """

    va: Address
    pa: Address
    pa2: Address | None = None
    region: str
    in_guest: bool
    source: bool = False
    owner: Owner | None = None

    @property
    def described_owner(self) -> str:
        """What the page is, for people."""
        if self.owner is not None:
            return str(self.owner) + (" (where the secret was read from)" if self.source else "")
        return _FOR_PEOPLE[Sort.GUEST] if self.in_guest else "not a guest page"


class FoundCanary(Document, frozen=True):
    """A canary that was read.

    Attributes:
        canary: Its number.
        places: Where.
    """

    canary: Count
    places: tuple[Place, ...]


class Scan(Document, frozen=True, kw_only=True):
    """What was read of all that the kernel maps, and found there. It holds neither the canaries nor the secret: a
    report must not become one more place they are found in.

    Attributes:
        for: What was looked for.
        secret_bytes: How long the secret is; null for canaries.
        canaries_found: Distinct valid canaries; null for a secret.
        bytes_scanned: Bytes read.
        bytes_unread: Bytes that are mapped and not readable through /proc/kcore there.
        frames_unread: Pages of memory among them that no other mapping showed either.
        device_pages: Pages of devices' registers and firmware's tables, which are mapped and not read; null in results
            of an older offmap.
        threads: Threads that read.
        seconds: How long it took.
        found: The canaries, in order of their numbers.
        places: Where the secret was read.
    """

    for_: Literal["canaries", "secret"] = msgspec.field(default="canaries", name="for")
    secret_bytes: Count | None = None
    canaries_found: Count | None
    bytes_scanned: Count
    bytes_unread: Count
    frames_unread: Count
    device_pages: Count | None = None
    threads: Count = 1
    seconds: Seconds
    found: tuple[FoundCanary, ...]
    places: tuple[Place, ...] = ()

    @property
    def findings(self) -> list[Place]:
        """Where the secret counts as found: not in its own file, and not gone at a second look."""
        return [p for p in self.places if not p.source and (p.owner is None or p.owner.sort != Sort.GONE)]

    @property
    def count(self) -> str:
        """What was found, in words."""
        if self.secret_bytes is not None:
            return f"the secret at {len(self.places)} place{'' if len(self.places) == 1 else 's'}"
        return f"{len(self.found)} {'canary' if len(self.found) == 1 else 'canaries'}"
