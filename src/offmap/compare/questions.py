"""What the comparison asks of each way of hiding guest RAM, and what an answer is.

An answer is a number, a yes, a no, or "not determined" with the reason; never a default. Each `Question.title` is a
statement: True says that it holds.
"""

from collections.abc import Mapping
from enum import Enum
from statistics import median, quantiles

from msgspec import Struct

MIN_PAIRS = 5
"""Fewer pairs of samples give no ratio, as they do not show the spread."""


class Group(Enum):
    """The four questions of the comparison."""

    WORKS = "works"
    HIDDEN = "hidden"
    BREAKS = "breaks"
    COSTS = "costs"

    @property
    def title(self) -> str:
        """As a heading."""
        return {
            Group.WORKS: "What works",
            Group.HIDDEN: "What is hidden",
            Group.BREAKS: "What breaks",
            Group.COSTS: "What it costs",
        }[self]


class Kind(Enum):
    """The types of an answer. Each answer can also be "not determined"."""

    TRI_STATE = "tri-state"  # yes, no
    NUMBER = "number"


class Better(Enum):
    """Which answers are better. HIGHER means yes, where the answer is yes or no."""

    LOWER = "lower"
    HIGHER = "higher"
    NEITHER = "neither"


class Question(Struct, frozen=True):
    """One row of the comparison.

    Attributes:
        id: stable, ``group.name``.
        title: a statement (tri-state) or a quantity (number), for the table.
        unit: of the number, for people; empty for a count and for yes or no.
        explanation: how the answer is measured, and what it means.
        emulation: why an emulated host (TCG) cannot show all of it; empty if it can.
    """

    id: str
    group: Group
    title: str
    kind: Kind
    better: Better
    unit: str = ""
    explanation: str = ""
    emulation: str = ""


class Ratio(Struct, frozen=True):
    """Candidate ÷ baseline: median and quartiles of the ratios of pairs that were measured by turns."""

    median: float
    low: float
    high: float
    pairs: int


class Answer(Struct, frozen=True):
    """The answer to one question in one cell.

    Attributes:
        question: its id.
        value: yes, no, or a number (the median of the samples); None if it was not determined.
        reason: why there is no value, or a remark on the value. Only an answer with a value may leave it empty.
        samples: each measurement of the candidate, in the question's unit and in order.
        baseline: each measurement of plain RAM in the same host. The n-th makes a pair with the n-th sample.
        detail: more text, of any length; the page shows it on a click.

    Raises:
        ValueError: no such question, a value of the wrong kind, or no value and no reason.
    """

    question: str
    value: bool | float | None
    reason: str = ""
    samples: tuple[float, ...] = ()
    baseline: tuple[float, ...] = ()
    detail: str = ""

    def __post_init__(self) -> None:
        asked = CATALOGUE.get(self.question)
        if asked is None:
            raise ValueError(f"no question {self.question!r}")
        if self.value is None:
            if not self.reason:
                raise ValueError(f"{self.question}: no value, and no reason why")
        elif not isinstance(self.value, (bool, int, float)):
            raise ValueError(f"{self.question}: {self.value!r} is no answer")
        elif isinstance(self.value, bool) is not (asked.kind is Kind.TRI_STATE):
            raise ValueError(f"{self.question}: {self.value!r} is no {asked.kind.value}")

    @property
    def ratio(self) -> Ratio | None:
        """Candidate ÷ baseline; None if fewer than MIN_PAIRS whole pairs were measured."""
        pairs = [(mine, plain) for mine, plain in zip(self.samples, self.baseline, strict=False) if plain > 0]
        if len(pairs) < MIN_PAIRS:
            return None
        ratios = [mine / plain for mine, plain in pairs]
        low, _, high = quantiles(ratios, n=4, method="inclusive")
        return Ratio(median(ratios), low, high, len(ratios))


_TLB = "emulation has no TLB and no nested page tables of the hardware's: page sizes cost nothing there"
_CPU = "an emulated CPU: only the ratio to plain RAM in the same host means anything"
_EXITS = "an emulated CPU has no virtual interrupt controller (AVIC, APICv), which would save hardware many exits"
_SPECULATION = "reach through the kernel's page tables is what is judged; an emulated CPU does not speculate"


def _yes(id: str, title: str, explanation: str, better: Better = Better.HIGHER, emulation: str = "") -> Question:
    return Question(id, Group(id.partition(".")[0]), title, Kind.TRI_STATE, better, "", explanation, emulation)


def _number(id: str, title: str, unit: str, better: Better, explanation: str, emulation: str = "") -> Question:
    return Question(id, Group(id.partition(".")[0]), title, Kind.NUMBER, better, unit, explanation, emulation)


_QUESTIONS = (
    _yes("works.boot", "boots", "The guest's init said that it is ready."),
    _yes("works.smp", "runs on 2 vCPUs", "A guest of 2 vCPUs has both online and runs on each."),
    _yes("works.virtio_blk", "virtio-blk", "Data written to a disk and read back past the guest's cache are the same."),
    _yes("works.virtio_net", "virtio-net", "Data sent to the host through a network interface came back the same."),
    _yes("works.vsock", "vsock", "Data sent to the host through a vsock connection came back the same."),
    _yes("works.balloon", "balloon gives memory back", "An inflated balloon made the host free the pages behind it."),
    _yes("works.kvm_clock", "kvm-clock", "The guest's clocksource is kvm-clock and goes forward."),
    _yes("works.steal_time", "steal time", "The guest's kernel is told of the time that its vCPU did not get."),
    _yes("works.async_pf", "async page faults", "The guest's kernel has enabled KVM's asynchronous page faults."),
    _yes("works.pv_eoi", "PV EOI", "The guest's kernel has enabled the paravirtual end of interrupt."),
    _yes("works.vhost_net", "vhost-net", "The host kernel's own vhost-net reaches the guest's rings and buffers."),
    _yes("works.ram_snapshot", "snapshot of RAM", "The VMM writes all guest RAM to a file, by its own mapping."),
    _yes(
        "hidden.before_io",
        "hidden after boot",
        "The audit's verdict of the running guest: no page of its RAM is mapped in the kernel half of the page tables.",
        emulation=_SPECULATION,
    ),
    _yes("hidden.after_io", "hidden after I/O", "The same, after disk and network I/O.", emulation=_SPECULATION),
    _number("hidden.ram_pages", "pages of guest RAM", "pages", Better.NEITHER, "All that the guest may use, and more."),
    _number("hidden.populated_pages", "pages in use", "pages", Better.NEITHER, "After boot: those that have a frame."),
    _number(
        "hidden.direct_map_pages",
        "in the direct map",
        "pages",
        Better.LOWER,
        "After boot, of the pages that have a frame by then: plain RAM gets them as the guest touches it.",
    ),
    _number("hidden.direct_map_pages_after_io", "in the direct map after I/O", "pages", Better.LOWER, "So after I/O."),
    _number("hidden.alias_pages", "aliased", "pages", Better.LOWER, "Mapped elsewhere; in detail, by region."),
    _number("hidden.alias_pages_after_io", "aliased after I/O", "pages", Better.LOWER, "The same, after I/O."),
    _number("hidden.unknown_pages", "could not be judged", "pages", Better.LOWER, "Never counted as hidden."),
    _number("hidden.excluded_pages", "kept from the guest", "pages", Better.LOWER, "As the audit found them aliased."),
    _number("hidden.canaries_planted", "secrets planted", "", Better.NEITHER, "By the guest, in its own RAM."),
    _number("hidden.scanned_bytes", "memory scanned", "bytes", Better.NEITHER, "All that the host kernel maps."),
    _number("hidden.canaries_found", "secrets found", "", Better.LOWER, "Read through the host kernel's mappings."),
    _number("hidden.canaries_found_after_io", "secrets found after I/O", "", Better.LOWER, "The same, after I/O."),
    _yes(
        "hidden.control",
        "positive control",
        "The same means found all the secrets of a plain guest in the same host; without it, nothing not found counts.",
    ),
    _yes(
        "hidden.attack",
        "an attack ends",
        "`offmap attack`, by /proc/kcore: the way from the host kernel to a secret in a process of the guest, by reads "
        "of what the kernel maps. It ends only if the same way leads to the secret of a plain guest beside it.",
        emulation=_SPECULATION,
    ),
    _number(
        "hidden.attack_reads",
        "reads of the attack",
        "",
        Better.NEITHER,
        "Words of eight bytes: until the secret was read, or it was certain that no mapping leads there. Baseline: of "
        "the plain guest.",
    ),
    _yes("hidden.zeroed", "zeroed once it is gone", "None of the guest's secrets is found after its end."),
    _yes("hidden.restored", "given back once it is gone", "The host has as much memory as before the guest."),
    _yes("breaks.o_direct", "O_DIRECT I/O", "The VMM reads from a file into guest RAM past the page cache."),
    _yes(
        "breaks.process_vm_readv",
        "process_vm_readv reads guest RAM",
        "Root on the host reads it by that call: handy for tools, and one reach more for an attacker.",
        Better.NEITHER,
    ),
    _yes("breaks.ptrace", "ptrace reads guest RAM", "PTRACE_PEEKDATA, as debuggers do.", Better.NEITHER),
    _yes("breaks.gdb_attach", "gdb attaches", "gdb attaches to the VMM and detaches; the guest goes on."),
    _yes("breaks.core_dump", "guest RAM is in a core dump", "A core of the VMM holds a secret.", Better.NEITHER),
    _yes("breaks.drop_caches", "outlives drop_caches", "The host drops its caches; the guest goes on, as hidden."),
    _yes("breaks.compaction", "outlives compaction", "The host compacts its memory; the guest goes on, as hidden."),
    _yes("breaks.memory_pressure", "outlives memory pressure", "The host runs short of memory; the guest goes on."),
    _yes("breaks.hibernation", "hibernation is allowed", "What /sys/power/state and /sys/power/disk offer meanwhile."),
    _yes("breaks.kexec", "kexec loads", "A kernel can be loaded with kexec_file_load while the guest runs."),
    _number(
        "costs.populate",
        "populating RAM",
        "µs/page",
        Better.LOWER,
        "From nothing to RAM that can be used, zeroed where it must be, for each 4 KiB.",
        _CPU,
    ),
    _number("costs.ram_ready", "RAM ready", "s", Better.LOWER, "The VMM's own time to get its guest's RAM.", _CPU),
    _number("costs.boot", "boot", "s", Better.LOWER, "From the VMM's start until the guest's init is ready.", _CPU),
    _number(
        "costs.exits",
        "exits in a boot",
        "",
        Better.LOWER,
        "Of all vCPUs, from power-on until the guest's init is ready, by KVM's own count.",
        _EXITS,
    ),
    _number(
        "costs.direct_map_split",
        "direct map in 4 KiB pages, more",
        "KiB",
        Better.LOWER,
        "DirectMap4k of /proc/meminfo while the guest runs, less that before it.",
    ),
    _number(
        "costs.direct_map_left",
        "of that, left for good",
        "KiB",
        Better.LOWER,
        "The same once the guest is gone, and its memory given back: 0 has healed.",
    ),
    _number("costs.copy", "guest memory bandwidth", "MB/s", Better.HIGHER, "A copy within guest RAM.", _TLB),
    _number("costs.chase", "pointer chase", "ns", Better.LOWER, "A dependent load at random in guest RAM.", _TLB),
    _number("costs.blk_read", "disk read", "MB/s", Better.HIGHER, "Sequential, past the guest's cache.", _CPU),
    _number("costs.blk_write", "disk write", "MB/s", Better.HIGHER, "Sequential, past the guest's cache.", _CPU),
    _number("costs.net", "network", "MB/s", Better.HIGHER, "One TCP stream from the guest to the host.", _CPU),
    _number("costs.vmm_memory", "memory of the VMM", "KiB", Better.LOWER, "Its own, without the guest's RAM."),
)

CATALOGUE: Mapping[str, Question] = {asked.id: asked for asked in _QUESTIONS}
"""All questions, in the order of the report."""
