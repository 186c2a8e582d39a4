"""python -m tests.kvm.attack: a guest attacks its VMM for minutes, and VMMs under attack are ended at random moments.

Beside the attacker a guest is left alone. For each end under attack there is one of an idle VMM, by turns.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles

from tests.conftest import FREESTANDING, PAYLOADS

from .attackers import Vmm, attacked_devices

_LINK = "-Wl,-N,-Ttext=0x1000000,--build-id=none,--no-warn-rwx-segments"
_SAID = 100  # ends after which it is said how they went
_SAMPLE = 10.0  # seconds between looks at the attacker's memory


def build(name: str, folder: Path) -> Path:
    """Compile a payload."""
    program = folder / f"{name}.elf"
    source = next(PAYLOADS.glob(f"{name}.[Sc]"))
    subprocess.run(["gcc", *FREESTANDING, _LINK, "-o", str(program), str(source)], check=True)
    return program


def attack(attacker: Path, victim: Path, minutes: float, options: Sequence[str]) -> bool:
    """Attack a VMM with these options for so long. Return whether nothing came of it."""
    beside_it = ("--memory", options[options.index("--memory") + 1], "--memory-size", "64M")
    with Vmm(victim, beside_it) as beside, Vmm(attacker, options) as vmm:
        beside.expect(b"U")
        beside.keys(b"f")
        beside.expect(b"F")
        vmm.expect(b"U")
        vmm.expect(b".", 4)
        least = most = vmm.own_memory()
        end, answers, slowest = time.monotonic() + 60 * minutes, 0, 0.0
        while (now := time.monotonic()) < end:
            while time.monotonic() < min(now + _SAMPLE, end):
                vmm.expect(b".")
                asked = time.monotonic()
                beside.keys(b"a")
                beside.expect(b"a")
                slowest = max(slowest, time.monotonic() - asked)
                answers += 1
            memory = vmm.own_memory()
            least, most = min(least, memory), max(most, memory)
        beside.keys(b"z")
        beside.expect(b"D")
        rounds, seen = 16 * vmm.output.count(b"."), b"!" in vmm.output
        seconds, status, errors = vmm.terminate()
    print(
        f"attack: {minutes} min, {rounds} rounds; the VMM's own memory {least >> 10} to {most >> 10} KiB; the other "
        f"guest answered {answers} times, in {slowest:.3f} s at most; its memory {'WAS' if seen else 'was not'} seen; "
        f"SIGTERM: {seconds:.3f} s, status {status}",
        flush=True,
    )
    good = status == 2 and errors.endswith("stopped by SIGTERM\n") and not seen and most - least < 5 << 20
    if not good:
        print(errors)
    return good


def ends(attacker: Path, victim: Path, count: int, seed: int, options: Sequence[str]) -> bool:
    """End so many VMMs under attack, and as many idle ones. Return whether each ended as it should."""
    dice, good = random.Random(seed), True
    attacked: list[float] = []
    idle: list[float] = []
    for number in range(count):
        for program, seconds in ((attacker, attacked), (victim, idle)):
            with Vmm(program, options) as vmm:
                vmm.expect(b"U")
                time.sleep(dice.random() / 2)
                took, status, errors = vmm.terminate()
                seconds.append(took)
            if status != 2 or not errors.endswith("offmap run: stopped by SIGTERM\n"):
                good = False
                print(f"end {number}: status {status}\n{errors}", flush=True)
        if (number + 1) % _SAID == 0 or number + 1 == count:
            print(f"SIGTERM to the end, {_spread('under attack', attacked)}; {_spread('idle', idle)}", flush=True)
    return good


def _spread(name: str, seconds: Sequence[float]) -> str:
    tail = quantiles(seconds, n=100)[98] if len(seconds) > 1 else seconds[0]
    return f"{name}: median {median(seconds):.3f} s, 99 % {tail:.3f} s, most {max(seconds):.3f} s (n={len(seconds)})"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kvm.attack", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--ends", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--memory", default="memfd", help="the kind of RAM of all guests (default: %(default)s)")
    parser.add_argument("--net", action="append", default=[], help="a card of the attacked VMM, like passt or tap=…")
    parser.add_argument(
        "--load", action="append", default=[], metavar="MODULE", help="load it first; in a disposable host only"
    )
    args = parser.parse_args()
    for module in args.load:
        subprocess.run(
            ["modprobe", module], check=True, env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
        )
    with tempfile.TemporaryDirectory(dir="/run" if Path("/run").is_dir() else None) as folder:
        attacker, victim = build("attack", Path(folder)), build("monitor", Path(folder))
        options = attacked_devices(Path(folder), args.memory, args.net)
        good = not args.minutes or attack(attacker, victim, args.minutes, options)
        good = (not args.ends or ends(attacker, victim, args.ends, args.seed, options)) and good
        return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
