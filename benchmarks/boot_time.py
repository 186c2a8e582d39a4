"""From the start of the VMM's process to the guest's init: `offmap run` on hidden RAM against QEMU's microvm.

Both run by turns in one disposable host, with the same kernel, initrd, command line and size: ours on `reserved`, QEMU
on ordinary RAM. A run is timed from just before the VMM is forked to the line that the guest's init prints first.
"""

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from command import benchmark_parser, exit_status
from figure import Figure, Limit
from lab_runs import GUEST_SIZE, add_inside_options, qemu_argv, run_in_lab
from offmap.compare.guest import READY
from offmap.errors import OffmapError
from offmap.lab.qemu import find_qemu

COMMAND_LINE = "console=ttyS0 quiet"
DEADLINE = 120.0  # seconds for one boot
PEER = "qemu-system-x86_64 -M {} -accel kvm, on ordinary RAM"
MACHINE = "microvm,acpi=on"
TUNED_MACHINE = "microvm,acpi=on,rtc=on"  # without an RTC, Linux waits for one


def time_to(expected: bytes, argv: Sequence[str], then: Callable[[int], object] = lambda _: None) -> float:
    """Seconds from just before ``argv`` is started until it has printed ``expected``; it is then ended.

    Args:
        then: is called with its process id before that.

    Raises:
        OffmapError: it ended, or a time passed in which any guest boots, without it.
    """
    with tempfile.TemporaryFile() as errors:
        started = time.monotonic()
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, bufsize=0)
        try:
            said = _read_until(expected, process, started + DEADLINE)
            seconds = time.monotonic() - started
            if expected in said:
                then(process.pid)
        finally:
            process.terminate()  # both give their memory back and go
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        if expected not in said:
            errors.seek(0)
            last = (errors.read() + said).decode(errors="replace").strip().splitlines()[-1:]
            raise OffmapError(f"{argv[0]} did not get its guest to init: {''.join(last)}")
    return seconds


def _read_until(expected: bytes, process: subprocess.Popen[bytes], deadline: float) -> bytes:
    said = b""
    console = process.stdout
    if console is None:
        return said
    with selectors.DefaultSelector() as selector:
        selector.register(console, selectors.EVENT_READ)
        while expected not in said and (left := deadline - time.monotonic()) > 0 and selector.select(left):
            data = os.read(console.fileno(), 65536)
            if not data:
                break
            said += data
    return said


def offmap_command(kernel: str, initrd: str, memory: str, *more: str) -> list[str]:
    """`offmap run` with this guest."""
    argv = [sys.executable, "-m", "offmap", "run", "--kernel", kernel, "--initrd", initrd]
    return [*argv, "--cmdline", COMMAND_LINE, "--memory", memory, "--memory-size", GUEST_SIZE, *more]


def qemu_command(kernel: str, initrd: str, machine: str) -> list[str]:
    """QEMU's quickest machine with the same guest. ``pci=off``, which offmap adds too, helps it."""
    return [*qemu_argv(machine), "-kernel", kernel, "-initrd", initrd, "-append", f"{COMMAND_LINE} pci=off"]


def split(kernel: str, initrd: str, rounds: int) -> tuple[list[float], list[float]]:
    """Where our time goes: seconds until Python has imported `offmap run`, and until the RAM is ready (apart)."""
    ready = READY.encode()
    imports, populate = [], []
    hello = "import offmap.cli.main, offmap.cli.run; print('imported', flush=True)"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        for _ in range(rounds):
            imports.append(time_to(b"imported", [sys.executable, "-c", hello]))
            time_to(ready, offmap_command(kernel, initrd, "reserved", "--report", str(report)))
            with suppress(FileNotFoundError):
                measured: dict[str, Any] = json.loads(report.read_text())
                populate.append(measured["populate_seconds"])
    return imports, populate


def inside(kernel: str, initrd: str, rounds: int) -> int:
    """Measure, in the disposable host."""
    ready = READY.encode()
    reserved, anon = (offmap_command(kernel, initrd, memory) for memory in ("reserved", "anon"))
    qemu, tuned_qemu = (qemu_command(kernel, initrd, machine) for machine in (MACHINE, TUNED_MACHINE))
    ours: list[float] = []
    peer: list[float] = []
    tuned: list[float] = []
    plain: list[float] = []
    for number in range(rounds + 1):
        # The first round fills the page cache for both.
        samples = [time_to(ready, argv) for argv in (reserved, qemu, tuned_qemu, anon)]
        if number:
            for kept, seconds in zip((ours, peer, tuned, plain), samples, strict=True):
                kept.append(seconds)
    facts = {"memory": GUEST_SIZE, "qemu": qemu_version(), "guest_kernel": Path(kernel).name}
    name = "process start to init, 256M"
    peer_is, tuned_is = PEER.format(MACHINE), PEER.format(TUNED_MACHINE)
    Figure("boot_time", f"{name}, reserved", "s", ours, peer_is, peer, Limit("ratio", 1.0), facts).print()
    Figure("boot_time", f"{name}, reserved, against QEMU with an RTC", "s", ours, tuned_is, tuned, facts=facts).print()
    Figure("boot_time", f"{name}, anon", "s", plain, peer_is, peer, facts=facts).print()
    imports, populate = split(kernel, initrd, 1 if rounds < 5 else 3)
    Figure("boot_time", "of that, Python and its imports", "s", imports, facts=facts).print()
    if populate:
        Figure("boot_time", "of that, reserved RAM locked, mapped and zeroed", "s", populate, facts=facts).print()
    return 0


def qemu_version() -> str:
    """What QEMU says that it is."""
    done = subprocess.run([find_qemu(), "--version"], capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0] if done.stdout else ""


def main() -> int:
    parser = benchmark_parser(__doc__, rounds=5, quick="2 rounds")
    add_inside_options(parser)
    args = parser.parse_args()
    rounds = 2 if args.quick else args.rounds

    def run() -> int:
        if args.inside:
            return inside(args.guest_kernel, args.guest_initrd, rounds)
        return run_in_lab(__file__, ["--rounds", str(rounds)])

    return exit_status("boot_time", run)


if __name__ == "__main__":
    sys.exit(main())
