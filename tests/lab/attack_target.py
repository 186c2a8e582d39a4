"""Attacks on guests of several kinds of RAM, each beside a plain one, run in a disposable host.

``attack_target.py KERNEL INITRD LEARNT KIND…`` prints one JSON object: the result of the attack on each kind, by its
name. LEARNT: what ``offmap attack --learn`` wrote. A kind is one of ``offmap compare``'s, or one of COMMANDS. What may
follow it:

- ``+``: it is attacked by the command line too, through kcore, with knowledge that is wrong, through the VMM's own
  mapping, and with its RAM mapped by the test module.
- ``=``: all that the host maps is swept for its secret.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from offmap.attack.attack import Beforehand, Victim, attack
from offmap.attack.kcore_primitive import KcorePrimitive
from offmap.attack.knowledge import Kernel, known
from offmap.attack.module_primitive import ModulePrimitive
from offmap.attack.primitive import Primitive
from offmap.attack.sweep import parse_pieces
from offmap.attack.target import PlantedSecret
from offmap.audit.audit import snapshot_process
from offmap.compare.kinds import kind_of
from offmap.compare.vm_process import VmProcess
from offmap.compare.vmm_command import GuestSetup, vmm_command
from offmap.lab.qemu import find_qemu
from offmap.patience import scaled

DEADLINE = scaled(120.0)
SECRET = re.compile(r"(?s)offmap-guest: pieces ([0-9a-f,]+)\s.*offmap-guest: secret ([0-9a-f]{64})")
READY = re.compile(r"(?s)(?=.*offmap-guest: secret [0-9a-f]{64}).*offmap-guest: ready")
PAGE = 4096
WRONG = "mm_struct.pgd"
PLANT = "OFFMAP_SECRET=1"


@dataclass(frozen=True)
class Planted:
    """A guest with a planted secret: the PID of its VMM; the secret's digest, and it in pieces."""

    pid: int
    digest: str
    pieces: str

    def victim(self, sweep: bool = False) -> Victim:
        return Victim(self.pid, PlantedSecret("sh", self.digest), parse_pieces(self.pieces) if sweep else None)


def qemu(kernel: str, initrd: str) -> list[str]:
    """QEMU with ordinary private memory."""
    argv = [find_qemu(), "-nodefaults", "-no-user-config", "-display", "none", "-accel", "kvm", "-m", "256M"]
    argv += ["-M", "q35", "-cpu", "host", "-kernel", kernel, "-initrd", initrd, "-serial", "stdio"]
    return [*argv, "-append", f"console=ttyS0 quiet {PLANT}"]


def wrapped_qemu(kernel: str, initrd: str) -> list[str]:
    """The same under ``offmap wrap``."""
    return [sys.executable, "-m", "offmap", "wrap", "--", *qemu(kernel, initrd)]


COMMANDS = {"qemu-anon": qemu, "wrapped-qemu": wrapped_qemu}


def start(stack: ExitStack, kind: str, kernel: str, initrd: str) -> Planted:
    """Start a guest that plants a secret."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    if kind in COMMANDS:
        command = COMMANDS[kind](kernel, initrd)
    else:
        command = vmm_command(GuestSetup(kind_of(kind), Path(kernel), Path(initrd), words=PLANT), folder)
    vmm = stack.enter_context(VmProcess(command, folder))
    said = vmm.wait_for(READY, DEADLINE)
    match = SECRET.search(said)
    if match is None:
        raise SystemExit(f"{kind}: {vmm.complaint()}: {said[-2000:]}")
    return Planted(vmm.pid, match[2], match[1])


def by_command(learnt: str, victim: Planted, control: Planted, *extra: str) -> Any:
    """What ``offmap attack`` says, with its exit status."""
    command = [sys.executable, "-m", "offmap", "attack", str(victim.pid), "--secret", victim.digest, "--json"]
    command += ["--control", f"{control.pid}:{control.digest}", "--host-kernel", learnt]
    command += ["--primitive", "module", *extra]
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

    def note(name: str, made: Primitive, build: Kernel = kernel, sweep: bool = False) -> None:
        with made as primitive:
            result = attack(primitive, Beforehand(build, build), victim.victim(sweep), control.victim())
        found[name] = result.to_json()

    with ExitStack() as whole:
        control = start(whole, "anon", image, initrd)
        for each in kinds:
            kind = each.rstrip("+=")
            with ExitStack() as stack:
                victim = start(stack, kind, image, initrd)
                note(kind, ModulePrimitive(), sweep="=" in each)
                if "+" not in each:
                    continue
                found[f"{kind}, by command"] = by_command(learnt, victim, control)
                found[f"{kind}, user memory"] = by_command(learnt, victim, control, "--user-memory")
                note(f"{kind}, kcore", KcorePrimitive())
                note(f"{kind}, wrong", ModulePrimitive(), wrong(kernel))
                fd = alias(victim.pid)
                note(f"{kind}, aliased", ModulePrimitive())
                note(f"{kind}, aliased, kcore", KcorePrimitive())
                os.close(fd)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
