"""Stands in for offmap.compare.measure: does to its host what it is told to, by the kind of RAM of its cell.

Usage: compare_target.py {"anon": "panic", …} [JOB_JSON]; without a job it takes one from each line of its input.
"""

import fcntl
import json
import os
import struct
import sys
import termios
import time
from pathlib import Path
from typing import Any

QUESTION = "costs.boot"


def say(event: dict[str, Any]) -> None:
    """Print an event."""
    print(json.dumps(event), flush=True)


def answer(question: str, value: float) -> dict[str, Any]:
    """Compose an answer as offmap.compare.questions has it."""
    return {"answer": {"question": question, "value": value, "reason": "", "samples": [], "baseline": [], "detail": ""}}


def wait_for(path: Path) -> None:
    """Wait until a file is there."""
    while not path.exists():
        time.sleep(0.05)


def measure(how: dict[str, str], job: dict[str, Any]) -> int:
    """Do to the host what `how` says; return the exit status."""
    backend = job["spec"]["backend"]
    mode, _, argument = how.get(backend, "ok").partition(" ")
    say({"host": {"kernel": os.uname().release, "lab": "OFFMAP_LAB" in os.environ}})
    say({"stage": "asking", "share": 0.5})
    say({"question": "works.boot"})
    say({"answer": {**answer("works.boot", 0)["answer"], "value": True}})
    say({"question": QUESTION})
    if mode == "sleep":
        time.sleep(float(argument))
    if mode == "panic":
        while struct.unpack("i", fcntl.ioctl(1, termios.FIONREAD, bytes(4)))[0]:
            time.sleep(0.05)
        time.sleep(2)  # nothing tells that what was read here has left this host
        Path("/proc/sysrq-trigger").write_text("c")
    if mode == "hang":
        time.sleep(3600)
    if mode == "garbage":
        print("Segmentation fault", flush=True)
    if mode == "silent":
        print("it broke", file=sys.stderr)
        return 3
    if mode == "refuse":
        say({"outcome": "refused", "reason": "not on this host; ask another"})
        return 0
    if mode == "wait":  # native only: says who it is, and waits for a word
        mark = Path(argument) / f"{backend}.{os.getpid()}"
        mark.touch()
        wait_for(Path(argument) / "go")
    say(answer(QUESTION, 1.5))
    say({"outcome": "booted", "reason": ""})
    return 0


def main() -> int:
    """Run it."""
    how = json.loads(sys.argv[1])
    for text in sys.argv[2:] or sys.stdin:
        if status := measure(how, json.loads(text)):
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
