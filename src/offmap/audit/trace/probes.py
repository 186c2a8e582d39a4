"""Which kernel functions are probed, and what each one's arguments are.

A function that is called within its own file may be inlined there: then its symbol exists and the probe never fires
(``__vmap_pages_range_noflush`` in 6.12, for vmap). So the functions here are those that other files call, and the two
mechanisms that a program can set off are tried out before they are relied on (``control``).

Arguments are fetched by kprobes' own language (Documentation/trace/kprobetrace.rst). An array has at most 64 members.
"""

from dataclasses import dataclass
from enum import Enum

ARRAYS = 4
MEMBERS = 64
LISTED_PAGES = ARRAYS * MEMBERS
"""Pages of an array whose frames an event tells: 1 MiB of memory."""

_PAGES = " ".join(f"p{n}=+{n * MEMBERS * 8}($arg1):x64[{MEMBERS}]" for n in range(ARRAYS))


class Role(Enum):
    """What an event says."""

    PAGES = "pages"  # an array of struct page is going to be mapped; the address comes with RETURN
    RETURN = "return"
    PHYSICAL = "physical"  # physical memory is mapped at an address
    DIRECT = "direct"  # pages are put into the direct map: struct page and number
    DIRECT_RANGE = "direct range"  # the same of a range of physical addresses
    DIRECT_ADDRESS = "direct address"  # the same of addresses in the direct map
    FIXMAP = "fixmap"  # one page at a fixed address
    BLIND = "blind"  # something is mapped, and the event does not tell which frames
    GONE = "gone"  # the mapping at this address ends
    SLOTS = "slots"  # a process changes the memory slots of the VM with this struct kvm
    EXIT = "exit"  # a process has no memory any more


@dataclass(frozen=True)
class Probe:
    """One function.

    Attributes:
        symbol: its name.
        role: what its call says.
        fetch: the arguments to record.
        at_return: probed at its return.
        mechanism: what is not traced where none of a mechanism's functions can be probed.
    """

    symbol: str
    role: Role
    fetch: str
    mechanism: str
    at_return: bool = False

    @property
    def event(self) -> str:
        """Its name as an event."""
        return f"{self.symbol}_ret" if self.at_return else self.symbol

    def definition(self, group: str) -> str:
        """The line for kprobe_events."""
        return f"{'r' if self.at_return else 'p'}:{group}/{self.event} {self.symbol} {self.fetch}"


VMAP = "vmap"
IOREMAP = "ioremap and memremap"
UNMAP = "the end of mappings"
EXIT = "the end of a process's memory"
SLOTS = "KVM's memory slots"

NEEDED = (VMAP, IOREMAP, EXIT, SLOTS)
"""Without these, nothing is said of the time between two walks."""

PROBES = (
    Probe("vmap", Role.PAGES, f"n=$arg2:u32 {_PAGES}", VMAP),
    Probe("vmap", Role.RETURN, "va=$retval:x64", VMAP, at_return=True),
    Probe("vm_map_ram", Role.PAGES, f"n=$arg2:u32 {_PAGES}", "vm_map_ram"),
    Probe("vm_map_ram", Role.RETURN, "va=$retval:x64", "vm_map_ram", at_return=True),
    Probe("ioremap_page_range", Role.PHYSICAL, "va=$arg1:x64 end=$arg2:x64 pa=$arg3:x64", IOREMAP),
    Probe("vmap_page_range", Role.PHYSICAL, "va=$arg1:x64 end=$arg2:x64 pa=$arg3:x64", "vmap_page_range"),
    Probe("remove_vm_area", Role.GONE, "va=$arg1:x64", UNMAP),
    Probe("vm_unmap_ram", Role.GONE, "va=$arg1:x64", UNMAP),
    Probe("set_direct_map_default_noflush", Role.DIRECT, "page=$arg1:x64", "set_direct_map"),
    Probe("set_direct_map_valid_noflush", Role.DIRECT, "page=$arg1:x64 n=$arg2:u32 on=$arg3:u8", "set_direct_map"),
    Probe("__kernel_map_pages", Role.DIRECT, "page=$arg1:x64 n=$arg2:u32 on=$arg3:u8", "debug_pagealloc"),
    Probe("set_memory_p", Role.DIRECT_ADDRESS, "va=$arg1:x64 n=$arg2:u32", "set_memory_p"),
    Probe("init_memory_mapping", Role.DIRECT_RANGE, "pa=$arg1:x64 end=$arg2:x64", "memory hot-plug"),
    Probe("native_set_fixmap", Role.FIXMAP, "pa=$arg2:x64", "fixmap"),
    Probe("vmap_pfn", Role.BLIND, "n=$arg2:u32", "vmap_pfn"),
    Probe("apply_to_page_range", Role.BLIND, "mm=$arg1:x64 n=$arg3:x64", "apply_to_page_range"),
    Probe("kvm_set_memslot", Role.SLOTS, "kvm=$arg1:x64", SLOTS),
    Probe("kvm_set_memory_region", Role.SLOTS, "kvm=$arg1:x64", SLOTS),
    Probe("__kvm_set_memory_region", Role.SLOTS, "kvm=$arg1:x64", SLOTS),
    Probe("exit_mmap", Role.EXIT, "", EXIT),
)

BY_EVENT = {probe.event: probe for probe in PROBES}

NEVER_TRACED = (
    "code that writes page-table entries itself (modules that call no function of the kernel for it)",
    "page tables of their own: kexec's, EFI's, text_poke's, hibernation's",
    "functions that the compiler has put into their callers, where a probe does not see them",
    "memory that a VMM put under its slots between the last audit and its own end",
)
"""What no probe of these sees on any kernel."""
