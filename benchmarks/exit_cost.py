"""What one port-I/O exit costs in offmap's vCPU loop, and in the same loop in C.

The guest writes to (or reads from) a port N times in a loop; the device there only keeps the byte. Ours is what
`offmap run` runs: VcpuLoop on a thread of its own, PioBus, a device. The peer (exit_cost.c) is compiled now, with -O2.
Both run the same guest by turns; the guest's own instructions and the kernel's share are in both.
"""

import ctypes
import mmap
import platform
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from c_program import compile_program
from command import benchmark_parser, exit_status
from figure import Figure, Limit
from offmap.devices.bus import MmioBus, PioBus
from offmap.errors import OffmapError
from offmap.kvm import Kvm
from offmap.uapi import kvm as uapi
from offmap.vmm.vcpu_loop import ExitCounts, VcpuLoop

CODE = 0x1000
MEMORY = 0x10000
PORT = 0xE0  # in no PC device's range
STOP_PORT = 0xF4  # where QEMU's isa-debug-exit sits by custom
MAX_RATIO = 1.2


class Latch:
    """What was written to its port last is what reads there."""

    byte_wide = True

    def __init__(self) -> None:
        self.last = 0

    def ports(self) -> Sequence[range]:
        return [range(PORT, PORT + 1)]

    def read(self, port: int, size: int) -> int:
        return self.last

    def write(self, port: int, size: int, value: int) -> None:
        self.last = value


class Stopper:
    """Ends the loop when it is written to."""

    byte_wide = True

    def __init__(self) -> None:
        self.loop: VcpuLoop | None = None

    def ports(self) -> Sequence[range]:
        return [range(STOP_PORT, STOP_PORT + 1)]

    def read(self, port: int, size: int) -> int:
        return 0

    def write(self, port: int, size: int, value: int) -> None:
        if self.loop is not None:
            self.loop.request_stop()


def guest_code(access: str, exits: int) -> bytes:
    """Real-mode code: ``exits`` accesses to PORT, then a write to STOP_PORT."""
    instruction = {"out": b"\xee", "in": b"\xec"}[access]  # out dx, al; in al, dx
    loop = instruction + b"\x66\x49"  # dec ecx
    loop += b"\x75" + struct.pack("b", -len(loop) - 2)  # jnz to its start
    start = b"\x66\xb9" + struct.pack("<I", exits) + b"\xba" + struct.pack("<H", PORT)  # mov ecx, exits; mov dx, PORT
    return start + loop + b"\xe6" + bytes([STOP_PORT]) + b"\xf4"  # out STOP_PORT, al; hlt


def run_ours(code: bytes, counts: ExitCounts | None = None) -> float:
    """Run the guest by VcpuLoop; returns the seconds that took.

    Raises:
        OffmapError: /dev/kvm refuses, or the guest stopped by itself.
    """
    stopper = Stopper()
    pio = PioBus()
    pio.attach(Latch())
    pio.attach(stopper)
    with ExitStack() as stack:
        memory = stack.enter_context(mmap.mmap(-1, MEMORY, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        memory[CODE : CODE + len(code)] = code
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        vm = stack.enter_context(stack.enter_context(Kvm()).create_vm())
        vm.set_user_memory_region(0, 0, MEMORY, address)
        vcpu = stack.enter_context(vm.create_vcpu(0))
        sregs = vcpu.get_sregs()
        sregs.cs.base = sregs.cs.selector = 0
        vcpu.set_sregs(sregs)
        vcpu.set_regs(uapi.kvm_regs(rip=CODE, rflags=2))
        loop = stopper.loop = VcpuLoop(vcpu, pio, MmioBus(), counts)
        seconds: list[float] = []
        failures: list[OffmapError] = []

        def run() -> None:
            started = time.monotonic()
            stop = loop.run()
            seconds.append(time.monotonic() - started)
            if stop is not None and stop.error is not None:
                failures.append(stop.error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if failures:
            raise failures[0]
    return seconds[0]


def run_peer(program: Path, code: bytes) -> float:
    """Run the guest by the loop in C; returns the seconds that took.

    Raises:
        OffmapError: it failed.
    """
    argv = [str(program), str(PORT), str(STOP_PORT)]
    done = subprocess.run(argv, input=code, capture_output=True, check=False)
    if done.returncode:
        raise OffmapError(f"the loop in C failed: {done.stderr.decode(errors='replace').strip()}")
    return float(done.stdout)


def measure(program: Path, access: str, exits: int, rounds: int) -> None:
    """Run both by turns and print the figures."""
    code = guest_code(access, exits)
    counts = ExitCounts()
    run_ours(code, counts)  # the guest does what it is meant to; and all is warm
    if counts["io", PORT, access] != exits:
        raise OffmapError(f"the guest left {counts['io', PORT, access]} times, not {exits}")
    ours: list[float] = []
    peer: list[float] = []
    for number in range(rounds):
        # Who goes first alternates, so that a drift of the machine's speed favours neither.
        if number % 2:
            ours.append(run_ours(code) / exits * 1e6)
        peer.append(run_peer(program, code) / exits * 1e6)
        if not number % 2:
            ours.append(run_ours(code) / exits * 1e6)
    peer_is = "the same loop in C, gcc -O2"
    # A CPython that runs from a shared libpython is slower by some tenths of a microsecond.
    shared = "/libpython3" in Path("/proc/self/maps").read_text()
    facts = {"exits": exits, "python": platform.python_version(), "libpython": "shared" if shared else "static"}
    name = f"{access} exit"
    Figure("exit_cost", name, "us", ours, peer_is, peer, Limit("ratio", MAX_RATIO), facts).print()
    # What does not depend on how long the processor and KVM take for an exit here.
    share = [mine - theirs for mine, theirs in zip(ours, peer, strict=True)]
    Figure("exit_cost", f"{access} exit, the interpreter's share", "us", share, facts=facts).print()


def main() -> int:
    parser = benchmark_parser(__doc__, rounds=7, quick="5 short rounds")
    parser.add_argument("--exits", type=int, default=200_000, metavar="N", help="per run (default: %(default)s)")
    args = parser.parse_args()
    exits, rounds = (20_000, 5) if args.quick else (args.exits, args.rounds)

    def run() -> int:
        with tempfile.TemporaryDirectory() as folder:
            program = compile_program(Path(__file__).with_suffix(".c"), Path(folder))
            for access in ("out", "in"):
                measure(program, access, exits, rounds)
        return 0

    return exit_status("exit_cost", run)


if __name__ == "__main__":
    sys.exit(main())
