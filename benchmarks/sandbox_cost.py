"""What the sandbox of the VMM costs: `offmap run` against `offmap run --no-sandbox`, by turns in one disposable host.

From process start to the guest's init, on `reserved`; and operations a second of a drive (virtio_blk.c in the guest).
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import boot_time
import virtio_blk
from command import benchmark_parser, exit_status
from figure import Figure, Limit
from lab_runs import GUEST_SIZE, add_inside_options, run_in_lab
from offmap.compare.guest import READY

PEER = "offmap run --no-sandbox"
PATTERNS = "randread:4096:1,seqread:1048576:1"
MOST_BOOT = 1.03
LEAST_DRIVE, MOST_DRIVE = 0.97, 1.03


def boots(kernel: str, initrd: str, rounds: int) -> None:
    """Boot by turns."""
    argv = boot_time.offmap_command(kernel, initrd, "reserved")
    samples: list[tuple[float, float]] = []
    for number in range(rounds + 1):
        order = (argv, [*argv, "--no-sandbox"])
        # Each goes first as often as the other: what one leaves in the host's caches is not the other's gain.
        seconds = [boot_time.time_to(READY.encode(), each) for each in (order if number % 2 else order[::-1])]
        if number:  # the first round fills the page cache
            samples.append((seconds[0], seconds[1]) if number % 2 else (seconds[1], seconds[0]))
    ours, peer = zip(*samples, strict=True)
    limit = Limit("ratio", at_most=MOST_BOOT)
    facts = {"memory": GUEST_SIZE}
    Figure("sandbox_cost", "process start to init, reserved", "s", ours, PEER, peer, limit, facts).print()


def drives(kernel: str, initrd: str, rounds: int) -> None:
    """Measure a drive by turns."""
    samples: list[tuple[Mapping[str, float], Mapping[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "tmpfs", "none", folder], check=True)
        image = Path(folder) / "image"
        image.write_bytes(os.urandom(virtio_blk.IMAGE_SIZE))
        argv = virtio_blk.offmap_command(kernel, initrd, str(image), "reserved")
        for number in range(rounds):
            order = (argv, [*argv, "--no-sandbox"])
            found = [virtio_blk.measure(each) for each in (order if number % 2 else order[::-1])]
            samples.append((found[0], found[1]) if number % 2 else (found[1], found[0]))
        subprocess.run(["umount", folder], check=True)
    limit = Limit("ratio", at_least=LEAST_DRIVE, at_most=MOST_DRIVE)
    for pattern in samples[0][0]:
        ours, peer = ([sample[side][pattern] for sample in samples] for side in (0, 1))
        Figure("sandbox_cost", f"{pattern}, reserved", "operations/s", ours, PEER, peer, limit).print()


def main() -> int:
    parser = benchmark_parser(__doc__, rounds=9, quick="2 rounds")
    parser.add_argument("--what", choices=["boot", "drive"], default="", help="only this (default: both)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each pattern (default: %(default)s)")
    add_inside_options(parser)
    args = parser.parse_args()
    rounds = 2 if args.quick else args.rounds

    def run() -> int:
        if args.inside:
            (boots if args.what == "boot" else drives)(args.guest_kernel, args.guest_initrd, rounds)
            return 0
        done = 0
        for what in ("boot", "drive"):
            if args.what in ("", what):
                initrd = virtio_blk.guest(args.seconds, PATTERNS.split(",")) if what == "drive" else None
                done = max(done, run_in_lab(__file__, ["--rounds", str(rounds), "--what", what], initrd=initrd))
        return done

    return exit_status("sandbox_cost", run)


if __name__ == "__main__":
    sys.exit(main())
