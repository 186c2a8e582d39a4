"""What `offmap audit --watch --trace` costs a guest: its start and its disk reads, traced and not, by turns.

The host is a disposable one. The guest is offmap's, on `reserved`, with a drive (`virtio_blk.py`). An idle VM beside it
is watched: the probes are the whole host's, and walks of the page tables would be measured too otherwise.
"""

import ctypes
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from command import benchmark_parser, exit_status
from figure import Figure, Limit
from lab_runs import add_inside_options, run_in_lab
from offmap.errors import OffmapError
from offmap.kvm import Kvm
from offmap.uapi.page import PAGE_SIZE
from virtio_blk import IMAGE_SIZE, guest, measure, offmap_command

PATTERN = "randread:4096:16"
PEER = "the same without a trace"
_MOST = 0.03  # of the guest's throughput


@contextmanager
def idle_vm() -> Iterator[int]:
    """A process with a VM of 4 MiB that runs nothing; its PID."""
    ready, told = os.pipe()
    if (child := os.fork()) == 0:
        memory = mmap.mmap(-1, 4 << 20)
        for at in range(0, len(memory), PAGE_SIZE):
            memory[at] = 1
        vm = Kvm().create_vm()
        vm.set_user_memory_region(0, 0, len(memory), ctypes.addressof(ctypes.c_char.from_buffer(memory)))
        os.write(told, b"!")
        signal.pause()
    try:
        os.close(told)
        if os.read(ready, 1) != b"!":
            raise OffmapError("a VM could not be made")
        yield child
    finally:
        os.close(ready)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@contextmanager
def traced(pid: int) -> Iterator[None]:
    """For as long as this lasts, the host is traced."""
    argv = [sys.executable, "-m", "offmap", "audit", str(pid), "--watch", "3600", "--trace", "--json"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as watch:
        assert watch.stdout is not None
        try:
            if not watch.stdout.readline():  # the first audit is done, and the trace is running
                raise OffmapError("the trace did not start")
            yield
            if watch.poll() is not None:
                raise OffmapError("the trace ended before the guest did")
        finally:
            watch.terminate()
            watch.stdout.read()


def look(argv: list[str], seconds: float) -> tuple[float, float]:
    """Seconds of a guest besides its measuring, and its reads a second."""
    began = time.monotonic()
    reads = measure(argv)[PATTERN]
    return time.monotonic() - began - seconds, reads


def inside(kernel: str, initrd: str, rounds: int, seconds: float) -> int:
    samples: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder, idle_vm() as pid:
        image = Path(folder) / "image"
        image.write_bytes(bytes(IMAGE_SIZE))
        argv = offmap_command(kernel, initrd, str(image), "reserved")
        for _ in range(rounds):
            samples[False].append(look(argv, seconds))
            with traced(pid):
                samples[True].append(look(argv, seconds))
    for column, name, unit, limit in (
        (0, "start and end of a guest, traced", "s", Limit("ratio", at_most=1 + _MOST, all_pairs=True)),
        (1, f"{PATTERN}, traced", "reads/s", Limit("ratio", at_least=1 - _MOST, all_pairs=True)),
    ):
        ours, peer = ([each[column] for each in samples[with_it]] for with_it in (True, False))
        Figure("trace_cost", name, unit, ours, PEER, peer, limit).print()
    return 0


def main() -> int:
    parser = benchmark_parser(__doc__, rounds=5, quick="one round")
    parser.add_argument("--seconds", type=float, default=5.0, help="of reading (default: %(default)s)")
    add_inside_options(parser)
    args = parser.parse_args()
    rounds = 1 if args.quick else args.rounds

    def run() -> int:
        if args.inside:
            return inside(args.guest_kernel, args.guest_initrd, rounds, args.seconds)
        more = ["--rounds", str(rounds), "--seconds", str(args.seconds)]
        return run_in_lab(__file__, more, initrd=guest(args.seconds, [PATTERN]))

    return exit_status("trace_cost", run)


if __name__ == "__main__":
    sys.exit(main())
