"""256 MiB of a clean pool, from opening its file to having it mapped, against `unplugged`, by turns: seconds.

And 100 starts on a pool of 2 GiB: guests of 64 to 512 MiB with a VM and a canary each, up to eight at a time, half of
them killed. What is wrong afterwards is counted: a guest that found another's bytes or failed in another way than for
want of room, memory of the pool that is not free again, and what of the host's own memory is not as it was.
"""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from command import benchmark_parser, exit_status
from figure import Figure, Limit
from lab_runs import add_inside_options, run_in_lab
from offmap.errors import OffmapError
from offmap.kmod.lab_build import lab_module
from offmap.lab.provision import host_kernel

MAX_RATIO = 0.1
ROOT = Path(__file__).resolve().parents[1]
POOL, LEAST, MOST = 2048, 64, 512  # MiB


def ask(*what: str) -> Any:
    """What tests/lab/pool_target.py does in this host."""
    argv = [sys.executable, "-m", "tests.lab.pool_target", *what]
    done = subprocess.run(argv, capture_output=True, cwd=ROOT, check=False)
    if done.returncode:
        raise OffmapError(f"{what[0]}: status {done.returncode}: {done.stderr.decode().strip()[-300:]}")
    return json.loads(done.stdout)


def inside(rounds: int, starts: int, module: str) -> int:
    subprocess.run(["insmod", module], check=True)
    found = ask("speed", str(rounds))
    limit = Limit("ratio", MAX_RATIO)
    name = "pool, 256 MiB, from open to mapped"
    Figure("pool", name, "s", found["pool"], "unplugged", found["unplugged"], limit).print()
    found = ask("stress", str(starts), str(POOL), str(LEAST), str(MOST))
    said, size = found["said"], found["size"]
    wrong = sum(count for what, count in said.items() if what not in ("runs", "full"))
    wrong += sum(not same for same in found["same"].values()) + (found["pool"] != [size, size, 0, 0, 0])
    facts = {"said": said, "at_a_time": found["most"], "pool": found["pool"], "same": found["same"]}
    limit = Limit("ours", 0)
    Figure("pool", f"{starts} starts on 2 GiB, what went wrong", "", [wrong], limit=limit, facts=facts).print()
    return 0


def main() -> int:
    parser = benchmark_parser(__doc__, rounds=5, quick="one round, and 20 starts")
    add_inside_options(parser, "--starts", "--module")
    args = parser.parse_args()
    if args.inside:
        return exit_status("pool", partial(inside, args.rounds, int(args.starts), args.module))
    rounds, starts = (1, 20) if args.quick else (args.rounds, 100)

    def run() -> int:
        arguments = ["--rounds", str(rounds), "--starts", str(starts), "--module", str(lab_module(host_kernel()))]
        return run_in_lab(__file__, arguments, memory="4G")

    return exit_status("pool", run)


if __name__ == "__main__":
    sys.exit(main())
