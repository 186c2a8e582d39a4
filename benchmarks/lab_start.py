"""A disposable host from a snapshot against a full boot: `offmap lab exec -- true`, by the clock and in processor time.

Both are run by turns, as commands of their own. The snapshot is made beforehand, by a start that is not counted.
"""

import os
import subprocess
import sys
import tempfile
import time

from command import benchmark_parser, exit_status
from figure import Figure, Limit
from offmap.errors import OffmapError

LIMIT = Limit("ratio", at_most=0.2)
PEER = "offmap lab exec --fresh -- true"


def timed(*options: str) -> tuple[float, float]:
    """Run the command; return its seconds by the clock, and of processor time with QEMU's.

    Raises:
        OffmapError: it failed.
    """
    argv = [sys.executable, "-m", "offmap.cli.main", "lab", "exec", *options, "--", "true"]
    with tempfile.TemporaryDirectory(prefix="offmap-lab-start-") as folder:
        before, began = os.times(), time.monotonic()
        done = subprocess.run(argv, check=False, cwd=folder, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
        passed, after = time.monotonic() - began, os.times()
    if done.returncode != 0:
        raise OffmapError(f"the host does not start: {done.stderr.decode(errors='replace').strip()}")
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return passed, used


def measure() -> int:
    """Measure, and print a line of JSON for each figure."""
    parser = benchmark_parser(__doc__, 5, "one start of each kind")
    parser.add_argument("--host-kernel", metavar="KERNEL", help="as for offmap lab exec")
    args = parser.parse_args()
    options = ["--host-kernel", args.host_kernel] if args.host_kernel else []
    timed(*options)
    ours, fresh = [], []
    for _ in range(1 if args.quick else args.rounds):
        ours.append(timed(*options))
        fresh.append(timed("--fresh", *options))
    met = True
    for index, name in enumerate(("by the clock", "processor time")):
        figure = Figure(
            "lab_start",
            f"offmap lab exec -- true, {name}",
            "s",
            [pair[index] for pair in ours],
            PEER,
            [pair[index] for pair in fresh],
            LIMIT,
        )
        figure.print()
        met = met and bool(figure.to_json()["limit"]["met"])
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(exit_status("lab_start", measure))
