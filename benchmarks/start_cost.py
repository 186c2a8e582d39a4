"""Processor time from the start of `offmap run` to its guest's first instruction, and the memory that it then has.

The guest is one instruction long: it writes a byte to its serial port. When the byte comes, the process's own clock is
read. `--old PYTHON` names the interpreter of another offmap's virtual environment, which is then measured by turns. By
default the guest is on `anon`, here; with `--lab` it is on `reserved`, in a disposable host.
"""

import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from command import benchmark_parser, exit_status
from figure import Figure, Limit
from lab_runs import GUEST_SIZE, add_icount_option, add_inside_options, run_in_lab
from offmap.errors import OffmapError
from offmap.uapi import bootparam as bp
from offmap.uapi.page import PAGE_SIZE

_CODE = bytes.fromhex("66baf803 b052 ee b00a ee fa f4 ebfd")  # mov dx, 0x3f8; out 'R', '\n'; cli; again: hlt; jmp again
_COMPILE = "import compileall, offmap; compileall.compile_dir(list(offmap.__path__)[0], quiet=1)"
_OWN_CLOCK = 2  # CPUCLOCK_SCHED, linux/posix-timers.h: of a process's clock, the time that it ran


def tiny_kernel() -> bytes:
    """A bzImage of these instructions, as most kernels are one: a setup sector, and the code at its 64-bit entry."""
    code = bytes(bp.ENTRY_64_OFFSET) + _CODE.ljust(16, b"\0")
    image = bytearray(1024) + code
    for form, offset, value in (
        ("B", bp.SETUP_SECTS, 1),
        ("I", bp.SYSSIZE, len(code) // 16),
        ("B", bp.JUMP + 1, bp.INIT_SIZE + 4 - bp.HEADER),
        ("4s", bp.HEADER, bp.HEADER_MAGIC),
        ("H", bp.VERSION, 0x20F),
        ("I", bp.INITRD_ADDR_MAX, (1 << 31) - 1),
        ("H", bp.XLOADFLAGS, bp.XLF_KERNEL_64),
        ("Q", bp.PREF_ADDRESS, 16 << 20),
        ("I", bp.INIT_SIZE, PAGE_SIZE),
    ):
        struct.pack_into(f"<{form}", image, offset, value)
    return bytes(image)


def start(argv: Sequence[str]) -> tuple[float, float]:
    """Start a guest: seconds of processor time of the process at its first instruction, and its PSS then, in MiB.

    The guest's RAM is not in the PSS.

    Raises:
        OffmapError: the guest did not start.
    """
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stderr is not None
        if os.read(process.stdout.fileno(), 1) != b"R":
            raise OffmapError(f"the guest did not start: {process.stderr.read().decode(errors='replace').strip()}")
        seconds = time.clock_gettime(~process.pid << 3 | _OWN_CLOCK)
        return seconds, pss(process.pid)
    finally:
        process.terminate()
        process.communicate()


def pss(pid: int) -> float:
    """MiB of a process's memory, shared pages in part, without the mappings that are as large as the guest's RAM."""
    total = size = 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "Size":
            size = int(rest.split()[0])
        elif name == "Pss" and size < 256 << 10:
            total += int(rest.split()[0])
    return total / 1024


def measure(old: str, memory: str, rounds: int) -> int:
    """Measure here."""
    pythons = [sys.executable, *([old] if old else [])]
    seconds: list[list[float]] = [[] for _ in pythons]
    sizes: list[list[float]] = [[] for _ in pythons]
    with tempfile.TemporaryDirectory() as folder:
        kernel = Path(folder) / "kernel"
        kernel.write_bytes(tiny_kernel())
        options = ["run", "--kernel", str(kernel), "--memory", memory, "--memory-size", GUEST_SIZE]
        for number in range(rounds + 1):
            for index, python in enumerate(pythons):
                spent, size = start([str(Path(python).with_name("offmap")), *options])
                if number:  # the first round fills the page cache
                    seconds[index].append(spent * 1000)
                    sizes[index].append(size)
    peer = (f"offmap run of {old}", seconds[1]) if old else ("", [])
    limit = Limit("ratio", at_most=0.5) if old else None
    name = f"processor time from process start to the first KVM_RUN, {memory}"
    Figure("start_cost", name, "ms", seconds[0], *peer, limit).print()
    peer = (f"offmap run of {old}", sizes[1]) if old else ("", [])
    name = f"PSS then, the guest's RAM left out, {memory}"
    Figure("start_cost", name, "MiB", sizes[0], *peer, Limit("ours", at_most=10.0)).print()
    return 0


def main() -> int:
    parser = benchmark_parser(__doc__, rounds=15, quick="3 rounds")
    parser.add_argument("--old", default="", metavar="PYTHON", help="of another offmap, to compare with")
    parser.add_argument("--lab", action="store_true", help="on reserved RAM in a disposable host")
    add_inside_options(parser)
    add_icount_option(parser)
    args = parser.parse_args()
    rounds = 3 if args.quick else args.rounds
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

    def run() -> int:
        if args.inside:
            return measure(args.old, "reserved", rounds)
        for python in filter(None, (sys.executable, args.old)):
            subprocess.run([python, "-c", _COMPILE], check=True)
        if args.lab:
            return run_in_lab(__file__, ["--rounds", str(rounds), "--old", args.old], icount=args.icount)
        return measure(args.old, "anon", rounds)

    return exit_status("start_cost", run)


if __name__ == "__main__":
    sys.exit(main())
