"""python -m tests.fuzz [TARGET…]: fuzz for some minutes, and say how it went.

With atheris (make fuzz installs it) coverage guides the inputs, and what they reached stays in out/fuzz for the next
run; --store makes the corpus in the tree of that. Without it they are random.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

_FOLDER = Path("out/fuzz")
_NOT_GUIDED = {"queue-raced"}  # what it reaches is luck


def main() -> int:
    """Return 0 if no target failed."""
    if sys.argv[1:2] == ["--one"]:  # atheris must be there before what it looks into
        return _one(sys.argv[2], *map(float, sys.argv[3:5]), store=sys.argv[5:] == ["--store"])
    from .run import TARGETS

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", choices=[[], *TARGETS], help=", ".join(TARGETS))
    parser.add_argument("--minutes", type=float, default=1.0, help="for all targets together, each processor at work")
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
    jobs = len(os.sched_getaffinity(0))
    seconds = options.minutes * 60 * min(jobs, len(targets)) / len(targets)
    more = [str(seconds), str(options.seed), *(["--store"] if options.store else [])]
    _FOLDER.mkdir(parents=True, exist_ok=True)
    print(f"seed {options.seed}, {'coverage guides' if find_spec('atheris') else 'random'}", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        return max(pool.map(lambda name: _start(name, more), targets))


def _start(name: str, more: Sequence[str]) -> int:
    done = subprocess.run([sys.executable, "-m", "tests.fuzz", "--one", name, *more], capture_output=True, check=False)
    sys.stdout.buffer.write(done.stdout)
    if done.returncode:
        sys.stdout.buffer.write(done.stderr)
        print(f"{name}: FAILED", flush=True)
    return int(done.returncode != 0)


def _one(name: str, seconds: float, seed: float, *, store: bool) -> int:
    if store:
        from .store import store_corpus

        print(f"{name}: {store_corpus(name, _FOLDER / name)} inputs")
        return 0
    if find_spec("atheris") and name not in _NOT_GUIDED:
        from . import guided

        guided.fuzz(name, seconds, int(seed), _FOLDER)
    from .run import run_for

    print(f"{name}: {run_for(name, seconds, int(seed))}", flush=True)
    return 0


sys.exit(main())
