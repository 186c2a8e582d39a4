"""Attacks on guests of several kinds of RAM, each beside a plain one, run in a disposable host.

``attack_target.py KERNEL INITRD LEARNT PRIMITIVE KIND…`` prints one JSON object: the result of the attack on each kind,
by its name. LEARNT: what ``offmap attack --learn`` wrote. A kind that ends in ``+alias`` is attacked once more with its
RAM mapped by the test module.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from offmap.audit.audit import snapshot_process
from offmap.compare.kinds import kind_of
from offmap.compare.vm_process import VmProcess
from offmap.compare.vmm_command import GuestSetup, vmm_command
from offmap.patience import scaled

DEADLINE = scaled(120.0)
SECRET = re.compile(r"offmap-guest: secret ([0-9a-f]{64})")
READY = re.compile(r"(?s)(?=.*offmap-guest: secret [0-9a-f]{64}).*offmap-guest: ready")
PAGE = 4096


def start(stack: ExitStack, kind: str, kernel: str, initrd: str) -> tuple[int, str]:
    """A guest with a planted secret: the PID of its VMM, and the secret's digest."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    setup = GuestSetup(kind_of(kind), Path(kernel), Path(initrd), words="OFFMAP_SECRET=1")
    vmm = stack.enter_context(VmProcess(vmm_command(setup, folder), folder))
    said = vmm.wait_for(READY, DEADLINE)
    match = SECRET.search(said)
    if match is None:
        raise SystemExit(f"{kind}: {vmm.complaint()}: {said[-2000:]}")
    return vmm.pid, match[1]


def attack(pid: int, digest: str, *options: str) -> Any:
    """What ``offmap attack`` says."""
    command = [sys.executable, "-m", "offmap", "attack", str(pid), "--secret", digest, "--json", *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    print(done.stderr, file=sys.stderr, end="", flush=True)
    return {**json.loads(done.stdout or "{}"), "status": done.returncode, "errors": done.stderr}


def alias(pid: int) -> int:
    """Map all of a guest's RAM that Linux does not own; the fd that holds the mapping."""
    judged = snapshot_process(pid).judged
    largest = int(judged.pages.argmax())
    fd = os.open("/dev/offmap-alias", os.O_WRONLY)
    os.write(fd, f"memremap {int(judged.pfn[largest]) * PAGE:#x} {int(judged.pages[largest]) * PAGE}".encode())
    return fd


def main() -> int:
    kernel, initrd, learnt, primitive, *kinds = sys.argv[1:]
    options = ["--host-kernel", learnt, "--primitive", primitive]
    found: dict[str, Any] = {}
    with ExitStack() as whole:
        control = "{}:{}".format(*start(whole, "anon", kernel, initrd))
        for each in kinds:
            kind, _, extra = each.partition("+")
            with ExitStack() as stack:
                pid, digest = start(stack, kind, kernel, initrd)
                found[kind] = attack(pid, digest, *options, "--control", control)
                if extra == "alias":
                    fd = alias(pid)
                    found[f"{kind}, aliased"] = attack(pid, digest, *options, "--control", control)
                    os.close(fd)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
