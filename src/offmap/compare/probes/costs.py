"""Costs, measured in pairs: the kind of RAM and plain RAM by turns, in the same host."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TypeVar

import numpy as np

from offmap.compare.kinds import BASELINE
from offmap.compare.probes.live_guest import LiveGuest
from offmap.compare.probes.network import Subnet, attempt, listen_tcp, sink_peer
from offmap.compare.probes.survey import measured, paired, undetermined
from offmap.compare.questions import Answer
from offmap.errors import OffmapError
from offmap.kvm import Kvm, Vm
from offmap.memory.backend import BACKENDS, Backend
from offmap.uapi.mman import MADV_POPULATE_WRITE
from offmap.uapi.page import PAGE_SIZE

PAIRS = 5
"""How many of each cost: fewer would not show the spread."""

_SECRET_SIZE = 32 << 20  # for kinds that change the direct map page by page, which is slow
_SIZE = 128 << 20  # a memory block of a small host, which is what `unplugged` takes at least
_DEBUGFS = Path("/sys/kernel/debug/kvm")

T = TypeVar("T")


def by_turns(
    pairs: int, candidate: Callable[[], T], baseline: Callable[[], T], *, warm_up: bool = True
) -> tuple[list[T], list[T]]:
    """Measure `pairs` of each, after one of each to warm up. Who goes first alternates."""
    mine: list[T] = []
    plain: list[T] = []
    for number in range(0 if warm_up else 1, pairs + 1):
        takes = [(mine, candidate), (plain, baseline)]
        for kept, take in takes if number % 2 else reversed(takes):
            taken = take()
            if number:
                kept.append(taken)
    return mine, plain


def populate(backend: Backend) -> Answer:
    """The time to get usable RAM: what the VMM does before the guest's first instruction, and a write to every page.

    Raises:
        OffmapError: the host does not give it.
    """
    size = _SECRET_SIZE if backend.page_by_page else _SIZE
    with Kvm() as kvm, kvm.create_vm() as vm:
        mine, plain = by_turns(
            PAIRS, lambda: _populate_once(vm, backend, size), lambda: _populate_once(vm, BACKENDS[BASELINE](), size)
        )
    detail = f"{size >> 20} MiB, {len(mine)} pairs; a write to each page included"
    return paired("costs.populate", mine, plain, detail=detail)


def _populate_once(vm: Vm, backend: Backend, size: int) -> float:
    """The time of one run, in microseconds a page."""
    started = monotonic()
    backings = backend.allocate(vm, size)
    try:
        for backing in backings:
            # Frames and page-table entries in one call where the kernel can (not of secret memory, nor PFNMAP).
            backing.madvise(MADV_POPULATE_WRITE)
            np.frombuffer(backing.view, dtype=np.uint8)[::PAGE_SIZE] = 0
        return round((monotonic() - started) / (size // PAGE_SIZE) * 1e6, 4)
    finally:
        for backing in backings:
            backing.close()


_COUNTS = ("exits", "io_exits", "mmio_exits", "irq_exits", "halt_exits", "pf_taken", "tlb_flush")


def exit_counts(pid: int) -> dict[str, int]:
    """VM exits of a guest since its start, by kind, as KVM counts them; empty if this kernel does not tell."""
    folders = list(_DEBUGFS.glob(f"{pid}-*")) if _DEBUGFS.is_dir() else []
    if not folders:
        return {}
    return {name: int((folders[0] / name).read_text()) for name in _COUNTS if (folders[0] / name).exists()}


def exits(mine: Sequence[Mapping[str, int]], plain: Sequence[Mapping[str, int]], baseline: str) -> Answer:
    """Exits of boots.

    Args:
        mine, plain: `exit_counts` of guests that had just booted, in pairs.
        baseline: the plain kind's name.
    """
    id = "costs.exits"
    if not all("exits" in counts for counts in (*mine, *plain)):
        return undetermined(id, "not measured: this kernel does not tell (no /sys/kernel/debug/kvm); mount debugfs")
    last, theirs = mine[-1], plain[-1]
    kinds = ", ".join(f"{name} {count} ({theirs.get(name, 0)} on {baseline})" for name, count in last.items())
    detail = f"from power-on to init ready, all vCPUs; in the last pair: {kinds}"
    mine_taken, plain_taken = ([float(counts["exits"]) for counts in each] for each in (mine, plain))
    return paired(id, mine_taken, plain_taken, detail=detail)


@dataclass(frozen=True, slots=True)
class Rate:
    """A rate that a guest measures itself.

    Attributes:
        command: for its program.
        convert: makes the question's unit of the number that it answers.
    """

    command: str
    convert: Callable[[float], float]


def _mb_per_s(size: int) -> Callable[[float], float]:
    return lambda microseconds: round(size / max(microseconds, 1.0), 3)  # bytes a µs are 10^6 bytes a second


# Each takes some tenths of a second under emulation: less would be lost in a clock tick.
_CHASE, _STEPS = 16 << 20, 500_000
_COPY, _COPIES, _DISK, _NET = 16 << 20, 12, 12 << 20, 4 << 20

RATES = {
    "costs.chase": Rate(f"chase {_CHASE} {_STEPS}", lambda nanoseconds: nanoseconds),
    "costs.copy": Rate(f"copy {_COPY} {_COPIES}", _mb_per_s(_COPY * _COPIES)),
    "costs.blk_read": Rate(f"read /dev/vda {_DISK}", _mb_per_s(_DISK)),
    "costs.blk_write": Rate(f"write /dev/vda {_DISK}", _mb_per_s(_DISK)),
}


def rates(id: str, guest: LiveGuest, plain: LiveGuest) -> Answer:
    """One of RATES, by both guests in turn. The other guest is idle meanwhile."""
    rate = RATES[id]
    mine, theirs = by_turns(
        PAIRS, lambda: rate.convert(guest.value(rate.command)), lambda: rate.convert(plain.value(rate.command))
    )
    return paired(id, mine, theirs, detail=f"{len(mine)} pairs of: {rate.command}")


def network_rate(guest: LiveGuest, plain: LiveGuest, subnets: Sequence[Subnet]) -> Answer:
    """TCP from each guest to the host, in turn.

    Args:
        subnets: of the candidate's interface, and of the plain guest's.
    """
    id, convert = "costs.net", _mb_per_s(_NET)

    def once(one: LiveGuest, subnet: Subnet) -> float:
        listener, port = listen_tcp(subnet)
        with listener, attempt(sink_peer, listener, _NET) as taken:
            microseconds = one.value(f"send {subnet.host.ip} {port} {_NET}")
            if not taken.result():
                raise OffmapError("the guest's stream ended early")
        return convert(microseconds)

    mine, theirs = by_turns(PAIRS, lambda: once(guest, subnets[0]), lambda: once(plain, subnets[1]))
    return paired(id, mine, theirs, detail=f"{len(mine)} pairs of {_NET >> 20} MiB by one TCP connection")


def boots(mine: Sequence[float], plain: Sequence[float], of_what: str) -> Answer:
    """Seconds of boots that were timed by turns."""
    pairs = min(len(mine), len(plain))
    few = "" if pairs >= PAIRS else f"of {pairs} pair{'s' if pairs > 1 else ''} only, which gives no spread"
    if not pairs:
        return undetermined("costs.boot", "no pair of boots was timed")
    return paired("costs.boot", mine, plain, few, f"from the VMM's start to init ready, {of_what}")


def vmm_memory(mine: int, plain: int) -> Answer:
    """The answer from the KiB of both VMMs, without their guest's RAM."""
    detail = f"resident pages of all its mappings but the guest's RAM (smaps); {plain} KiB on plain RAM"
    return Answer("costs.vmm_memory", mine, "", (float(mine),), (float(plain),), detail)


def split(id: str, before: Mapping[str, int], now: Mapping[str, int], when: str) -> Answer:
    """How many KiB of the direct map have been split into 4 KiB pages.

    Args:
        before, now: KiB by page size.
    """
    size = "DirectMap4k"
    if size not in before or size not in now:
        return undetermined(id, "this kernel does not tell how its direct map is split (/proc/meminfo)")
    sizes = ", ".join(f"{name} {before.get(name, 0)} KiB, now {kib}" for name, kib in now.items())
    return measured(id, now[size] - before[size], detail=f"{when}: {sizes}")
