"""`offmap audit --all` of 50 small VMs in a disposable host, against the same of one VM there: seconds, by turns.

Each VM is of a process of its own, on 4 MiB of memory that the host's command line set aside. An audit takes a second
at least, as the walks are spread over it (``--for 1``).
"""

import fcntl
import json
import mmap
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import addressof, c_char

from command import benchmark_parser, exit_status
from figure import Figure, Limit
from lab_runs import add_inside_options, run_in_lab
from offmap.errors import OffmapError

MANY = 50
MAX_RATIO = 3.0
_RESERVED = 0x4000_0000  # what lab_runs reserves in the host
_SIZE = 4 << 20
_KVM_CREATE_VM, _KVM_SET_USER_MEMORY_REGION = 0xAE01, 0x4020AE46  # linux/kvm.h


def make_vm(number: int) -> mmap.mmap:
    """Make a VM on hidden memory; it is whole for as long as that lives."""
    memory = mmap.mmap(os.open("/dev/mem", os.O_RDWR), _SIZE, offset=_RESERVED + number * _SIZE)
    vm = fcntl.ioctl(os.open("/dev/kvm", os.O_RDWR), _KVM_CREATE_VM, 0)
    at = addressof(c_char.from_buffer(memory))
    fcntl.ioctl(vm, _KVM_SET_USER_MEMORY_REGION, struct.pack("<IIQQQ", 0, 0, 0, _SIZE, at))
    return memory


@contextmanager
def vms(count: int) -> Iterator[None]:
    """So many VMs, each a child of this process."""
    children = []
    try:
        for number in range(count):
            ready, told = os.pipe()
            if (child := os.fork()) == 0:
                memory = make_vm(number)
                os.write(told, b"!" if memory else b"")
                signal.pause()
            children.append(child)
            os.close(told)
            if os.read(ready, 1) != b"!":
                raise OffmapError("a VM could not be made")
            os.close(ready)
        yield
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def audit_all(count: int) -> float:
    """Seconds that the command takes."""
    with vms(count):
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "offmap", "audit", "--all", "--json"], capture_output=True, text=True, check=False
        )
        taken = time.monotonic() - began
    found = json.loads(done.stdout) if done.returncode in {0, 1, 3} else {}
    if done.returncode or len(found["vms"]) != count:
        raise OffmapError(f"status {done.returncode}: {done.stderr or found}")
    return taken


def inside(rounds: int) -> int:
    pairs = [(audit_all(MANY), audit_all(1)) for _ in range(rounds)]
    many, single = ([pair[side] for pair in pairs] for side in (0, 1))
    limit = Limit("ratio", MAX_RATIO)
    Figure("audit_all", f"audit --all of {MANY} VMs", "s", many, "the same of one VM", single, limit).print()
    return 0


def main() -> int:
    parser = benchmark_parser(__doc__, rounds=3, quick="one round")
    add_inside_options(parser)
    args = parser.parse_args()
    rounds = 1 if args.quick else args.rounds

    def run() -> int:
        return inside(rounds) if args.inside else run_in_lab(__file__, ["--rounds", str(rounds)])

    return exit_status("audit_all", run)


if __name__ == "__main__":
    sys.exit(main())
