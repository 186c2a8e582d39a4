"""python -m tests.fuzz [TARGET…]: fuzz for some minutes, and say how it went.

With atheris (make fuzz installs it) coverage guides the inputs, and what they reached stays in out/fuzz for the next
run; --store makes the corpus in the tree of that. Without it they are random. --cases N runs N cases in all, random and
changed ones of the corpus by turns: what costs least, and is the same for the same seed.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

_FOLDER = Path("out/fuzz")
_NOT_GUIDED = {"queue-raced"}  # what it reaches is luck


def main() -> int:
    """Return 0 if no target failed."""
    if sys.argv[1:2] == ["--one"]:  # atheris must be there before what it looks into
        return _one(sys.argv[2], *map(float, sys.argv[3:6]), store=sys.argv[6:] == ["--store"])
    from .run import TARGETS

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", choices=[[], *TARGETS], help=", ".join(TARGETS))
    parser.add_argument("--minutes", type=float, default=1.0, help="for all targets together, each processor at work")
    parser.add_argument("--cases", type=int, default=0, metavar="N", help="for all targets together, not by time")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="targets at a time")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4)))
    parser.add_argument("--store", action="store_true", help="make the corpus in the tree of what is in out/fuzz")
    parser.add_argument("--coverage", action="store_true", help="run the corpus, and say which branches it reaches")
    options = parser.parse_args()
    if options.coverage:
        from .covered import cover

        covered = cover()
        print(covered, *covered.unexcused(), sep="\n")
        return 0
    targets = options.targets or list(TARGETS)
    seconds = options.minutes * 60 * min(options.jobs, len(targets)) / len(targets)
    cases = -(-options.cases // len(targets))
    more = [str(seconds), str(options.seed), str(cases), *(["--store"] if options.store else [])]
    _FOLDER.mkdir(parents=True, exist_ok=True)
    how = "coverage guides" if find_spec("atheris") and not cases else "random"
    print(f"seed {options.seed}, {how}", flush=True)
    began = time.monotonic()
    with ThreadPoolExecutor(options.jobs) as pool:
        failed = max(pool.map(lambda name: _start(name, more), targets))
    if cases:
        whole = cases * len(targets)
        print(f"{whole} cases of {len(targets)} targets in {time.monotonic() - began:.0f} s; failed: {failed}")
    return failed


def _start(name: str, more: Sequence[str]) -> int:
    done = subprocess.run([sys.executable, "-m", "tests.fuzz", "--one", name, *more], capture_output=True, check=False)
    sys.stdout.buffer.write(done.stdout)
    if done.returncode:
        sys.stdout.buffer.write(done.stderr)
        print(f"{name}: FAILED", flush=True)
    return int(done.returncode != 0)


def _one(name: str, seconds: float, seed: float, cases: float, *, store: bool) -> int:
    if store:
        from .store import store_corpus

        print(f"{name}: {store_corpus(name, _FOLDER / name)} inputs")
        return 0
    if cases:
        from .run import run_cases

        print(f"{name}: {run_cases(name, int(cases), int(seed))}", flush=True)
        return 0
    if find_spec("atheris") and name not in _NOT_GUIDED:
        from . import guided

        guided.fuzz(name, seconds, int(seed), _FOLDER)
    from .run import run_for

    print(f"{name}: {run_for(name, seconds, int(seed))}", flush=True)
    return 0


sys.exit(main())
