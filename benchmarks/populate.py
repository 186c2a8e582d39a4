"""What guest RAM costs to get: each kind, zeroed and mapped in the VMM, against a memfd of the same size by turns.

In three places: on this machine's own kernel (nothing is loaded into it, so not every kind), on a stock disposable
host with the offmap module, and on the patched one, where guest_memfd's flag is compared with its absence.
"""

import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ram
from command import benchmark_parser, exit_status
from figure import Figure, Limit
from lab_runs import add_inside_options, run_in_lab, shmem_huge_pages
from offmap.errors import BackendRefused, KernelError
from offmap.kmod.lab_build import lab_module
from offmap.kmod.loaded import load
from offmap.kvm import Kvm, Vm
from offmap.lab.build import built_tree, patched_kernel
from offmap.lab.provision import host_kernel
from offmap.lab.series import patch_series
from offmap.memory.backend import BACKENDS

SIZE = 256 << 20
SECRET_SIZE = 64 << 20  # what changes the direct map page by page takes its time
PATCHED = "patched:7.3"
PLACES = ("here", "stock", "patched")
NO_MODULE = tuple(name for name, backend in BACKENDS.items() if not backend.needs_module)
WHERE: Mapping[str, Sequence[str]] = {"here": NO_MODULE, "stock": tuple(BACKENDS), "patched": NO_MODULE}
"""The kinds that are tried in each place, and left out where they are refused; memfd against itself shows what such a
ratio is worth."""

PEER = "memfd, fallocate then MADV_POPULATE_WRITE"
MAX_UNPLUGGED = 0.3  # of memfd's time
MAX_UNMAPPED = 1.5  # of the unflagged guest_memfd's

Sample = tuple[float, float]
"""Seconds to get it, and to give it back."""


def sample(populate: ram.Populate, vm: Vm, size: int, threads: int) -> Sample:
    """Get RAM, and give it back."""
    started = time.monotonic()
    backing = populate(vm, size, threads)
    ready = time.monotonic()
    backing.close()
    return ready - started, time.monotonic() - ready


def by_turns(rounds: int, *takes: Callable[[], Sample]) -> list[list[Sample]]:
    """`rounds` samples of each after one that warms up; who goes first alternates."""
    samples: list[list[Sample]] = [[] for _ in takes]
    for number in range(rounds + 1):
        order = list(enumerate(takes))
        for which, take in order if number % 2 else reversed(order):
            taken = take()
            if number:
                samples[which].append(taken)
    return samples


def got(samples: Sequence[Sample]) -> list[float]:
    return [ready for ready, _ in samples]


def given_back(samples: Sequence[Sample]) -> list[float]:
    return [back for _, back in samples]


def direct_map() -> dict[str, int]:
    """The direct map's pages by size, in kB (/proc/meminfo)."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return {name.rstrip(":"): int(value) for name, value, *_ in lines if name.startswith("DirectMap")}


def tlb_flushes() -> int | None:
    """TLB flushes since the boot; None where the kernel does not count them (CONFIG_DEBUG_TLBFLUSH)."""
    fields = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    try:
        return sum(int(fields[name]) for name in ("nr_tlb_remote_flush_received", "nr_tlb_local_flush_one"))
    except KeyError:
        return None


def measure_unplugged(vm: Vm, rounds: int) -> None:
    """From asking to usable: the figure that has a limit, and what it does to the direct map."""
    ways = (ram.unplugged, ram.memfd, ram.memfd_by_advice, ram.memfd_huge)
    before = direct_map()
    with shmem_huge_pages("advise"):  # heard by memfd_huge only
        ours, peer, advised, huge = by_turns(rounds, *(lambda way=way: sample(way, vm, SIZE, 1) for way in ways))
    after = direct_map()
    facts = {"bytes": SIZE, "cpus": os.cpu_count()}
    name = "unplugged, from asking to zeroed and mapped"
    Figure("populate", name, "s", got(ours), PEER, got(peer), Limit("ratio", MAX_UNPLUGGED), facts).print()
    alone = "memfd, MADV_POPULATE_WRITE alone"
    Figure("populate", f"{name}, against {alone}", "s", got(ours), alone, got(advised), facts=facts).print()
    on_2m = "memfd with 2M pages (shmem_enabled=advise)"
    Figure("populate", f"{name}, against {on_2m}", "s", got(ours), on_2m, got(huge), facts=facts).print()
    Figure(
        "populate", "unplugged, giving it back", "s", given_back(ours), "memfd", given_back(peer), facts=facts
    ).print()
    changed = sum(abs(after[size] - before[size]) for size in before)
    Figure(
        "populate",
        "direct map, what taking and giving back has changed",
        "kB",
        [float(changed)],
        limit=Limit("ours", 0),
        facts={"before": before, "after": after, "times": rounds + 1},
    ).print()


def measure_kinds(vm: Vm, rounds: int, kinds: Sequence[str]) -> None:
    """µs a page of each, with one thread and with two."""
    for kind in kinds:
        try:
            for threads in thread_counts(kind):
                measure_kind(vm, rounds, kind, threads)
        except (BackendRefused, KernelError) as error:
            print(f"populate: {kind} was not measured on this kernel: {error}", file=sys.stderr)


def thread_counts(kind: str) -> tuple[int, ...]:
    """What is worth trying here."""
    return (1,) if kind in ram.SELF_THREADED or (os.cpu_count() or 1) < 2 else (1, 2)


def measure_kind(vm: Vm, rounds: int, kind: str, threads: int) -> None:
    size = secret_size() if BACKENDS[kind].page_by_page else SIZE
    pages = size // ram.PAGE
    before = direct_map()
    ours, peer = by_turns(
        rounds,
        lambda: sample(ram.KINDS[kind], vm, size, threads),
        lambda: sample(ram.memfd, vm, size, threads),
    )
    split = direct_map()["DirectMap4k"] - before["DirectMap4k"]
    facts: dict[str, Any] = {"bytes": size, "cpus": os.cpu_count(), "direct_map_4k_delta_kib": split}
    with_ = f"{threads} thread" + ("s" if threads > 1 else "")
    if kind in ram.SELF_THREADED:
        with_ = facts["threads"] = ram.SELF_THREADED[kind]
    cost = [[seconds / pages * 1e6 for seconds in got(samples)] for samples in (ours, peer)]
    Figure("populate", f"{kind}, {with_}", "us/page", cost[0], f"{PEER}, {threads}", cost[1], facts=facts).print()


def secret_size() -> int:
    """SECRET_SIZE, or less where no more may be locked."""
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if hard == resource.RLIM_INFINITY:
        return SECRET_SIZE
    return max(min(SECRET_SIZE, hard >> 20 << 20), 1 << 20)


def measure_flag(vm: Vm, rounds: int) -> None:
    """guest_memfd with the flag and without: time, and how many TLB flushes it takes."""
    size = SECRET_SIZE
    flushes: dict[str, list[float]] = {kind: [] for kind in ("guest_memfd-unmapped", "guest_memfd")}

    def take(kind: str) -> Sample:
        before = tlb_flushes()
        started = time.monotonic()
        with ram.KINDS[kind](vm, size, 1):
            ready = time.monotonic()
            if before is not None:
                flushes[kind].append((tlb_flushes() or 0) - before)
            closing = time.monotonic()
        return ready - started, time.monotonic() - closing

    samples = by_turns(rounds, *(lambda kind=kind: take(kind) for kind in flushes))
    cost = [[seconds / (size // ram.PAGE) * 1e6 for seconds in got(each)] for each in samples]
    facts = {"bytes": size, "cpus": os.cpu_count()}
    name = "guest_memfd-unmapped, by fallocate"
    unflagged = "guest_memfd without the flag"
    Figure("populate", name, "us/page", cost[0], unflagged, cost[1], Limit("ratio", MAX_UNMAPPED), facts).print()
    # Without those of the round that warms up.
    ours, peer = ([count / (size >> 21) for count in counted[1:]] for counted in flushes.values())
    if ours:
        Figure("populate", f"{name}, TLB flushes", "flushes per 2 MiB", ours, unflagged, peer, facts=facts).print()
        Figure("populate", "the same by faults, TLB flushes", "flushes per 2 MiB", by_faults(vm, size)).print()


def by_faults(vm: Vm, size: int) -> list[float]:
    """TLB flushes per 2 MiB when it is just touched: the control of how they are counted."""
    before = tlb_flushes() or 0
    with ram.guest_memfd_unmapped_by_faults(vm, size):
        return [((tlb_flushes() or 0) - before) / (size >> 21)]


def inside(place: str, module: str, rounds: int, limit_rounds: int, kinds: Sequence[str]) -> int:
    """Measure, in the place itself."""
    with Kvm() as kvm, kvm.create_vm() as vm:
        if place == "stock":
            load(Path(module))
            if "unplugged" in kinds:
                measure_unplugged(vm, limit_rounds)  # before anything has split the direct map
            if "hugetlb" in kinds:
                Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages").write_text(str(SIZE >> 21))
        if place == "patched" and "guest_memfd-unmapped" in kinds:
            measure_flag(vm, limit_rounds)
        measure_kinds(vm, rounds, [kind for kind in WHERE[place] if kind in kinds])
    return 0


def outside(place: str, rounds: int, limit_rounds: int, kinds: Sequence[str], quick: bool) -> int:
    """Go to the place, and measure there."""
    if place == "here":
        return inside(place, "", rounds, limit_rounds, kinds)
    arguments = ["--place", place, "--rounds", str(rounds), "--limit-rounds", str(limit_rounds)]
    arguments += [f"--kind={kind}" for kind in kinds]
    if place == "stock":
        arguments += ["--module", str(lab_module(host_kernel()))]
        return run_in_lab(__file__, arguments)
    if quick and built_tree(patch_series(PATCHED)) is None:
        print(f"populate: {PATCHED} has not been built, and --quick does not: not measured", file=sys.stderr)
        return 0
    kernel = patched_kernel(PATCHED, lambda line: print(f"populate: {line}", file=sys.stderr))
    return run_in_lab(__file__, arguments, kernel=kernel)


def main() -> int:
    quick = "3 rounds of what has no limit, and the patched kernel only if it is built"
    parser = benchmark_parser(__doc__, rounds=7, quick=quick)
    # More of them by default: they take a fraction of a second each, and this may be a busy machine.
    parser.add_argument(
        "--limit-rounds", type=int, default=7, metavar="N", help="of what has a limit (default: %(default)s)"
    )
    parser.add_argument("--place", choices=PLACES, action="append", help="where (default: all three)")
    parser.add_argument("--kind", choices=ram.KINDS, action="append", help="of RAM (default: all)")
    add_inside_options(parser, "--module")
    args = parser.parse_args()
    rounds = 3 if args.quick else args.rounds
    kinds = args.kind or list(ram.KINDS)

    def run() -> int:
        if args.inside:
            return inside(args.place[0], args.module, rounds, args.limit_rounds, kinds)
        places = args.place or PLACES
        return max(outside(place, rounds, args.limit_rounds, kinds, args.quick) for place in places)

    return exit_status("populate", run)


if __name__ == "__main__":
    sys.exit(main())
