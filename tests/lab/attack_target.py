"""Attacks on guests of several kinds of RAM, each beside a plain one, run in a disposable host.

``attack_target.py KERNEL INITRD LEARNT KIND…`` prints one JSON object: the result of the attack on each kind, by its
name. LEARNT: what ``offmap attack --learn`` wrote. A kind that ends in ``+`` is attacked by the command line too,
through kcore, with knowledge that is wrong, and with its RAM mapped by the test module.
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

import msgspec

from offmap.attack.attack import Beforehand, Victim, attack
from offmap.attack.kcore_primitive import KcorePrimitive
from offmap.attack.knowledge import Kernel, known
from offmap.attack.module_primitive import ModulePrimitive
from offmap.attack.target import PlantedSecret
from offmap.audit.audit import snapshot_process
from offmap.compare.kinds import kind_of
from offmap.compare.vm_process import VmProcess
from offmap.compare.vmm_command import GuestSetup, vmm_command
from offmap.patience import scaled

DEADLINE = scaled(120.0)
SECRET = re.compile(r"offmap-guest: secret ([0-9a-f]{64})")
READY = re.compile(r"(?s)(?=.*offmap-guest: secret [0-9a-f]{64}).*offmap-guest: ready")
PAGE = 4096
WRONG = "mm_struct.pgd"


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


def by_command(learnt: str, victim: tuple[int, str], control: tuple[int, str]) -> Any:
    """What ``offmap attack`` says, with its exit status."""
    command = [sys.executable, "-m", "offmap", "attack", str(victim[0]), "--secret", victim[1], "--json"]
    command += ["--control", f"{control[0]}:{control[1]}", "--host-kernel", learnt, "--primitive", "module"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    print(done.stderr, file=sys.stderr, end="", flush=True)
    return {**json.loads(done.stdout or "{}"), "status": done.returncode}


def wrong(kernel: Kernel) -> Kernel:
    """The same with one member elsewhere."""
    return msgspec.structs.replace(kernel, offsets={**kernel.offsets, WRONG: kernel.offsets[WRONG] + 8})


def alias(pid: int) -> int:
    """Map all of a guest's RAM that Linux does not own; the fd that holds the mapping."""
    judged = snapshot_process(pid).judged
    largest = int(judged.pages.argmax())
    fd = os.open("/dev/offmap-alias", os.O_WRONLY)
    os.write(fd, f"memremap {int(judged.pfn[largest]) * PAGE:#x} {int(judged.pages[largest]) * PAGE}".encode())
    return fd


def main() -> int:
    image, initrd, learnt, *kinds = sys.argv[1:]
    kernel = known(Path(learnt))
    found: dict[str, Any] = {}

    def note(name: str, which: type[KcorePrimitive] | type[ModulePrimitive], build: Kernel = kernel) -> None:
        victims = [Victim(pid, PlantedSecret("sh", digest)) for pid, digest in (victim, control)]
        with which() as primitive:
            found[name] = attack(primitive, Beforehand(build, build), *victims).to_json()

    with ExitStack() as whole:
        control = start(whole, "anon", image, initrd)
        for each in kinds:
            kind = each.rstrip("+")
            with ExitStack() as stack:
                victim = start(stack, kind, image, initrd)
                note(kind, ModulePrimitive)
                if kind == each:
                    continue
                found[f"{kind}, by command"] = by_command(learnt, victim, control)
                note(f"{kind}, kcore", KcorePrimitive)
                note(f"{kind}, wrong", ModulePrimitive, wrong(kernel))
                fd = alias(victim[0])
                note(f"{kind}, aliased", ModulePrimitive)
                note(f"{kind}, aliased, kcore", KcorePrimitive)
                os.close(fd)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
