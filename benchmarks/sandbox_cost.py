"""What the sandbox of the VMM costs: `offmap run` against `offmap run --no-sandbox`, by turns in one disposable host.

From process start to the guest's init, on `reserved`; operations a second of a drive (virtio_blk.c in the guest); a TCP
stream over a tap (virtio_net.c). Pairs are taken for as long as a part's share of --minutes lasts. Beside each ratio
stands the interval that the median of all pairs is in (95 %, by their order): a limit is met if all of it is within.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import boot_time
import virtio_blk
import virtio_net
from c_program import compile_program
from command import benchmark_parser, exit_status
from figure import Figure, Limit, median_interval
from lab_runs import GUEST_SIZE, add_icount_option, add_inside_options, run_in_lab
from offmap.compare.guest import READY

PEER = "offmap run --no-sandbox"
PATTERNS = "randread:4096:1,seqread:1048576:1"
MOST_BOOT = 1.03
LEAST_IO, MOST_IO = 0.97, 1.03
PARTS = ("boot", "drive", "net")
LEAST_PAIRS = 6  # fewer have no interval of 95 %
STREAM = 25_000_000  # bytes
LETTERS = "ud" * 3
Sample = Mapping[str, float]
Pairs = list[tuple[Sample, Sample]]


def by_turns(argv: Sequence[str], measure: Callable[[Sequence[str]], Sample], seconds: float, least: int) -> Pairs:
    """Measure `argv` with the sandbox and without, for so long, and at least so many pairs."""
    measure(argv)  # fills the page cache
    pairs: Pairs = []
    end = time.monotonic() + seconds
    while len(pairs) < least or time.monotonic() < end:
        order = (argv, [*argv, "--no-sandbox"])
        # Each goes first as often as the other: what one leaves in the host's caches is not the other's gain.
        first = len(pairs) % 2
        found = [measure(each) for each in (order[::-1] if first else order)]
        pairs.append((found[1], found[0]) if first else (found[0], found[1]))
    return pairs


def show(name: str, unit: str, pairs: Pairs, limit: Limit) -> int:
    """Print the figures of a part. Return 1 if the interval of one is not within its limit."""
    missed = 0
    for what in pairs[0][0]:
        ours, peer = ([pair[side][what] for pair in pairs] for side in (0, 1))
        ends = median_interval([mine / theirs for mine, theirs in zip(ours, peer, strict=True)])
        met = ends is not None and all(map(limit.allows, ends if limit.at_least is not None else ends[1:]))
        missed |= not met
        facts = {"memory": GUEST_SIZE, "interval_95": ends and [round(end, 4) for end in ends], "interval_met": met}
        Figure("sandbox_cost", f"{what}{name}", unit, ours, PEER, peer, limit, facts).print()
    return int(missed)


def boots(kernel: str, initrd: str, seconds: float, least: int) -> int:
    """Boot."""
    argv = boot_time.offmap_command(kernel, initrd, "reserved")
    pairs = by_turns(
        argv, lambda each: {"process start to init": boot_time.time_to(READY.encode(), each)}, seconds, least
    )
    return show(", reserved", "s", pairs, Limit("ratio", at_most=MOST_BOOT))


def drives(kernel: str, initrd: str, seconds: float, least: int) -> int:
    """Read from a drive."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "tmpfs", "none", folder], check=True)
        image = Path(folder) / "image"
        image.write_bytes(os.urandom(virtio_blk.IMAGE_SIZE))
        argv = virtio_blk.offmap_command(kernel, initrd, str(image), "reserved")
        pairs = by_turns(argv, virtio_blk.measure, seconds, least)
        subprocess.run(["umount", folder], check=True)
    return show(", reserved", "operations/s", pairs, Limit("ratio", at_least=LEAST_IO, at_most=MOST_IO))


def nets(kernel: str, initrd: str, seconds: float, least: int) -> int:
    """Send both ways over a tap."""
    virtio_net.make_tap()
    words = virtio_net.command_line(STREAM, LETTERS)
    argv = virtio_net.offmap_command(kernel, initrd, words, "reserved", f"tap={virtio_net.TAP}")
    with tempfile.TemporaryDirectory() as folder:
        program = compile_program(Path(virtio_net.__file__).with_suffix(".c"), Path(folder), "-static")

        def measure(each: Sequence[str]) -> Sample:
            found = virtio_net.measure(each, program, STREAM, LETTERS)
            return {f"TCP {virtio_net.DIRECTIONS[way]}": statistics.median(rates) for way, rates in found.items()}

        pairs = by_turns(argv, measure, seconds, least)
    return show(", tap, reserved", "MB/s", pairs, Limit("ratio", at_least=LEAST_IO, at_most=MOST_IO))


def main() -> int:
    parser = benchmark_parser(__doc__, rounds=LEAST_PAIRS, quick="2 pairs of each")
    parser.add_argument("--what", choices=PARTS, default="", help="only this (default: all)")
    parser.add_argument("--minutes", type=float, default=7.0, help="for all parts together (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.7, help="of each pattern of a drive (default: %(default)s)")
    add_inside_options(parser)
    add_icount_option(parser)
    args = parser.parse_args()
    minutes, least = (0.0, 2) if args.quick else (args.minutes, args.rounds)

    def run() -> int:
        if args.inside:
            part = {"boot": boots, "drive": drives, "net": nets}[args.what]
            return part(args.guest_kernel, args.guest_initrd, 60 * minutes, least)
        parts = (args.what,) if args.what else PARTS
        initrds = {
            "drive": lambda: virtio_blk.guest(args.seconds, PATTERNS.split(",")),
            "net": virtio_net.guest,
        }
        done = 0
        for what in parts:
            initrd = initrds[what]() if what in initrds else None
            options = ["--rounds", str(least), "--minutes", str(minutes / len(parts)), "--what", what]
            done = max(done, run_in_lab(__file__, options, initrd=initrd, icount=args.icount))
        return done

    return exit_status("sandbox_cost", run)


if __name__ == "__main__":
    sys.exit(main())
