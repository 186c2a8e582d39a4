"""The scan: seconds for a gigabyte, searched for canaries and for a secret.

Its peer is a loop in C (``scan_peer.c``, compiled when this runs) that preads the same bytes through the same file, in
the same pieces and with as many threads, and memcpy's them. The scan has to read at no less than half its speed.

Measured on /proc/kcore of a disposable host, all that it can show of what is mapped there (one thread: it has one
processor); and on a file in /dev/shm of this machine, with one thread and two, as there is more to lose where
reading is fast. Half of that file is zeroes, half is noise.
"""

import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from c_program import compile_program
from command import benchmark_parser, exit_status
from figure import Figure, Limit
from lab_runs import add_inside_options, run_in_lab
from offmap.audit.canary import CANARY_LENGTH, new_key
from offmap.audit.kcore import Kcore
from offmap.audit.own_memory import LockedBuffer
from offmap.audit.readable import Piece, Read, ioremap_areas, read_plan, union, zero_filled_intervals
from offmap.audit.regions import Layout
from offmap.audit.roots import walk_kcore
from offmap.audit.scan import canary_pattern, secret_pattern
from offmap.audit.search import Lane, Pattern, buffer_size, search
from offmap.audit.secret import Secret
from offmap.errors import OffmapError

PAGE = 4096
MAX_RATIO = 2.0
_STEP = 1 << 20  # what the peer reads at once
_SECRET_BYTES = 32
_FILE_BYTES = 1 << 30

Stretches = Sequence[tuple[int, int]]


def run_peer(program: str, path: str, stretches: Stretches, threads: int) -> float:
    """Seconds that the loop in C takes.

    Raises:
        OffmapError: it failed.
    """
    text = "".join(f"{offset} {size}\n" for offset, size in stretches)
    done = subprocess.run([program, path, str(threads)], input=text, capture_output=True, check=False, text=True)
    if done.returncode:
        raise OffmapError(f"{program} failed: {done.stderr.strip()}")
    return float(done.stdout)


@contextmanager
def canaries() -> Iterator[Pattern[Any]]:
    with LockedBuffer(PAGE) as prefix:
        yield canary_pattern(prefix, (new_key(),))


@contextmanager
def a_secret() -> Iterator[Pattern[Any]]:
    with Secret(secrets.token_bytes(_SECRET_BYTES)) as secret:
        yield secret_pattern(secret)


def run_ours(readable: Sequence[Piece], reads: Sequence[Read], pattern: Pattern[Any]) -> float:
    """Seconds that our search takes."""
    with ExitStack() as stack:
        size = buffer_size(CANARY_LENGTH)
        lanes = [Lane(read, stack.enter_context(LockedBuffer(size))) for read in reads]
        started = time.monotonic()
        search(readable, lanes, pattern)
        return time.monotonic() - started


def measure(
    where: str,
    readable: Sequence[Piece],
    reads: Sequence[Read],
    peer: Callable[[], float],
    rounds: int,
) -> None:
    """Search for either by turns with the peer, and print the figures."""
    total = sum(piece.bytes for piece in readable)
    for name, wanted in (("canaries", canaries), ("a secret", a_secret)):
        ours, theirs = [], []
        with wanted() as pattern:
            for _ in range(rounds):
                theirs.append(peer() / total * 1e9)
                ours.append(run_ours(readable, reads, pattern) / total * 1e9)
        facts = {
            "bytes": total,
            "threads": len(reads),
            "processors": len(os.sched_getaffinity(0)),
            "ours_mb_per_s": [round(1e3 / each) for each in ours],
            "peer_mb_per_s": [round(1e3 / each) for each in theirs],
        }
        peer_is = "pread and memcpy of the same bytes in C"
        threads = f"{len(reads)} thread{'s' if len(reads) > 1 else ''}"
        limit = Limit("ratio", MAX_RATIO)
        Figure("scan", f"{name}, {where}, {threads}", "s/GB", ours, peer_is, theirs, limit, facts).print()


def inside(program: str, rounds: int) -> int:
    """Measure /proc/kcore, in the disposable host."""
    with Kcore() as kcore, kcore.reader() as read:
        mappings = walk_kcore(kcore)
        layout = Layout.of(kcore.vmcoreinfo, kcore.page_offset_base, kcore.segments)
        ram = union(kcore.ram)
        zero_filled = zero_filled_intervals(kcore.page_flags, ram)
        readable, _ = read_plan(mappings, ram, kcore.segments, layout.vmemmap, zero_filled, ioremap_areas())
        stretches: list[tuple[int, int]] = []
        for start, end in union((piece.va, piece.va + piece.bytes) for piece in readable):
            for va in range(start, end, _STEP):
                offset = next(s.offset + va - s.va for s in kcore.segments if s.va <= va < s.va + s.size)
                stretches.append((offset, min(_STEP, end - va)))

        def peer() -> float:
            return run_peer(program, "/proc/kcore", stretches, 1)

        measure("/proc/kcore", readable, [read], peer, rounds)
    return 0


def measure_file(program: str, rounds: int) -> None:
    """Measure a file in memory on this machine, with one thread and with two."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="offmap-scan-") as file, ExitStack() as stack:
        noise = os.urandom(_STEP)
        for index in range(_FILE_BYTES // _STEP):
            file.write(noise if index % 2 else bytes(_STEP))
        file.flush()
        stretches = [(offset, _STEP) for offset in range(0, _FILE_BYTES, _STEP)]
        for threads in (1, 2):
            reads: list[Read] = []
            for _ in range(threads):
                fd = os.open(file.name, os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, fd)

                def read(va: int, buffer: memoryview, fd: int = fd) -> None:
                    os.preadv(fd, [buffer], va)

                reads.append(read)

            def peer(threads: int = threads) -> float:
                return run_peer(program, file.name, stretches, threads)

            measure("a file in /dev/shm", [Piece(0, 0, _FILE_BYTES)], reads, peer, rounds)


def main() -> int:
    parser = benchmark_parser(__doc__, rounds=5, quick="1 round")
    add_inside_options(parser, "--peer")
    args = parser.parse_args()
    rounds = 1 if args.quick else args.rounds

    def run() -> int:
        if args.inside:
            return inside(args.peer, rounds)
        with tempfile.TemporaryDirectory() as folder:
            program = str(compile_program(Path(__file__).with_name("scan_peer.c"), Path(folder), "-pthread"))
            measure_file(program, rounds)
            return run_in_lab(__file__, ["--rounds", str(rounds), "--peer", program])

    return exit_status("scan", run)


if __name__ == "__main__":
    sys.exit(main())
