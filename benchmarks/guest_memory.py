"""Memory as a guest sees it: a pointer chase and a copy on `unplugged` RAM against `memfd`, by turns in one host.

What can differ is the page size of the nested page tables, which KVM takes from the VMM's own page tables; it is read
from KVM's statistics at the end of each run. The guest is guest_memory.c, compiled now and alone in its initramfs.
With --patched: guest_memfd that is not in the direct map against plain, on a host with our patches.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from c_program import static_program
from command import benchmark_parser, exit_status
from figure import Figure, Limit
from lab_runs import GUEST_SIZE, add_inside_options, run_in_lab, shmem_huge_pages
from offmap.errors import OffmapError
from offmap.kmod.lab_build import lab_module
from offmap.kmod.loaded import load
from offmap.kvm.stats import MappedPages
from offmap.lab.cpio import char_device, directory, newc, regular
from offmap.lab.provision import host_kernel

COMMAND_LINE = "console=ttyS0 quiet"
DEADLINE = 120.0  # seconds for one guest
ENOUGH_PAIRS = 5  # to say that all of them agree by more than chance

FIGURES = {
    # What the guest calls it: its name and unit here.
    "chase_4k": ("pointer chase over 64 MiB, the guest's own pages 4K", "ns/step"),
    "chase_2m": ("pointer chase over 64 MiB, the guest's own pages 2M", "ns/step"),
    "copy": ("copy of 32 MiB", "s/GB"),
}


@dataclass(frozen=True, slots=True)
class Setting:
    """A kind of RAM, and what the host's shmem_enabled is meanwhile."""

    name: str
    backend: str
    shmem_enabled: str = "never"


UNPLUGGED = Setting("unplugged", "unplugged")
MEMFD = Setting("memfd", "memfd")
MEMFD_HUGE = Setting("memfd with shmem_enabled=advise", "memfd", "advise")
UNMAPPED = Setting("guest_memfd-unmapped", "guest_memfd-unmapped")
GUEST_MEMFD = Setting("guest_memfd", "guest_memfd")
PATCHED = "patched:7.3"


def parse_results(console: str) -> dict[str, float]:
    """What the guest printed.

    Raises:
        OffmapError: not all of it is there.
    """
    results = {
        name: float(value) for name, value in re.findall(r"^offmap-benchmark: (\w+) ([\d.]+)\r?\n", console, re.M)
    }
    if set(results) != set(FIGURES):
        raise OffmapError(f"the guest did not finish: {console.strip()[-300:]!r}")
    return results


def measure(setting: Setting, kernel: str, initrd: str) -> tuple[dict[str, float], MappedPages | None]:
    """Boot the guest on this RAM: what it measured, and the page sizes of its nested page tables.

    Raises:
        OffmapError: it did not finish.
    """
    with shmem_huge_pages(setting.shmem_enabled), tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        argv = [sys.executable, "-m", "offmap", "run", "--kernel", kernel, "--initrd", initrd, "--report", str(report)]
        # kvm-clock off on both: the same clock measures them.
        argv += ["--cmdline", COMMAND_LINE, "--memory", setting.backend, "--memory-size", GUEST_SIZE]
        argv += ["--kvm-clock", "off"]
        try:
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=DEADLINE, check=False)
        except subprocess.TimeoutExpired:
            raise OffmapError(f"the guest on {setting.name} did not end in {DEADLINE:g} s") from None
        if done.returncode:
            raise OffmapError(f"the guest on {setting.name} failed: {done.stderr.decode(errors='replace').strip()}")
        nested = json.loads(report.read_text())["nested_pages"]
    mapped = nested and MappedPages(nested["4K"], nested["2M"], nested["1G"])
    return parse_results(done.stdout.decode(errors="replace")), mapped


def inside(module: str, kernel: str, initrd: str, rounds: int) -> int:
    """Measure, in the disposable host; without a module, what our patches bring."""
    if module:
        load(Path(module))
    settings = (UNPLUGGED, MEMFD, MEMFD_HUGE) if module else (UNMAPPED, GUEST_MEMFD)
    results: dict[Setting, list[dict[str, float]]] = {setting: [] for setting in settings}
    nested: dict[Setting, MappedPages | None] = {}
    for number in range(rounds):
        for setting in settings if number % 2 else reversed(settings):
            result, nested[setting] = measure(setting, kernel, initrd)
            results[setting].append(result)
    pages = {setting.name: None if (mapped := nested[setting]) is None else str(mapped) for setting in settings}
    facts: dict[str, Any] = {"memory": GUEST_SIZE, "guest_kernel": Path(kernel).name, "nested_pages": pages}
    for key, (name, unit) in FIGURES.items():
        ours, peer, *huge = ([result[key] for result in results[setting]] for setting in settings)
        limit = None
        if rounds >= ENOUGH_PAIRS:
            limit = Limit("ratio", 1.0, all_pairs=True) if module else Limit("ratio", 1.02)
        title = f"{name}, {settings[0].name}"
        Figure("guest_memory", title, unit, ours, settings[1].name, peer, limit, facts).print()
        for values in huge:
            Figure(
                "guest_memory", f"{title}, against huge pages", unit, ours, MEMFD_HUGE.name, values, facts=facts
            ).print()
    return 0


def guest() -> bytes:
    """An initramfs whose init is guest_memory.c.

    Raises:
        OffmapError: there is no compiler, or it refuses.
    """
    console = char_device("dev/console", 5, 1)  # Documentation/admin-guide/devices.txt
    return newc([directory("dev"), console, regular("init", static_program(Path(__file__).with_suffix(".c")), 0o755)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__, rounds=5, quick="1 round, which is too few to say whether the limit is met")
    add_inside_options(parser, "--module")
    parser.add_argument("--patched", action="store_true", help="measure guest_memfd, on a host with our patches")
    args = parser.parse_args(arguments)
    rounds = 1 if args.quick else args.rounds

    def run() -> int:
        if args.inside:
            return inside(args.module, args.guest_kernel, args.guest_initrd, rounds)
        more = ["--rounds", str(rounds)]
        if args.patched:
            return run_in_lab(__file__, more, kernel=host_kernel(PATCHED), initrd=guest())
        return run_in_lab(__file__, [*more, "--module", str(lab_module(host_kernel()))], initrd=guest())

    return exit_status("guest_memory", run)


if __name__ == "__main__":
    sys.exit(main())
