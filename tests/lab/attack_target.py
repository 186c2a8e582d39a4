"""Attacks on guests of several kinds of RAM, each beside a plain one, run in a disposable host.

``python -m tests.lab.attack_target JOB KIND…`` prints one JSON object: the result of the attack on each kind, by its
name. JOB is a JSON file: ``boot`` (`attack_guests.Boot`); ``learnt``, what ``offmap attack --learn`` wrote of the
host's kernel; ``learnt_guest``, the same of the guests', if that is another. A kind is one of ``offmap compare``'s, or
one of `Boot.command`. What may follow it:

- ``+``: it is attacked by the command line too, through kcore, with knowledge that is wrong, through the VMM's own
  mapping, and with its RAM mapped by the test module.
- ``=``: all that the host maps is swept for its secret.
- ``%``: it is attacked through kcore, and not through the module.
- ``@VMLINUZ,LEARNT``: it boots this kernel, and is attacked alone.

A guest on ``reserved`` has the drives that JOB describes under ``drives``, each with a secret of its own.
"""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from offmap.attack.attack import Beforehand, attack
from offmap.attack.kcore_primitive import KcorePrimitive
from offmap.attack.knowledge import Kernel, known
from offmap.attack.module_primitive import ModulePrimitive
from offmap.attack.primitive import Primitive
from offmap.audit.audit import snapshot_process

from .attack_guests import OFFMAP, Boot, Planted, start

PAGE = 4096
WRONG = "mm_struct.pgd"


def by_command(learnt: str, victim: Planted, control: Planted) -> Any:
    """What ``offmap attack`` says, with its exit status."""
    command = [*OFFMAP, "attack", str(victim.pid), "--secret", victim.digest, "--json"]
    command += ["--control", f"{control.pid}:{control.digest}", "--host-kernel", learnt, "--primitive", "module"]
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


class Attacks:
    """The attacks, and what came of them."""

    def __init__(self, job: Any) -> None:
        self._boot, self._drives, self._learnt = Boot(**job["boot"]), job["drives"], job["learnt"]
        self._kernel = known(Path(self._learnt))
        self._guest = known(Path(job.get("learnt_guest", self._learnt)))
        self.found: dict[str, Any] = {}

    def run(self, kinds: list[str]) -> None:
        with ExitStack() as stack:
            self._control = start(stack, "anon", self._boot)
            for kind in kinds:
                with ExitStack() as inner:
                    self._kind(inner, kind)

    def _note(self, name: str, victim: Planted, made: Primitive, build: Kernel | None = None, how: str = "") -> None:
        beforehand = Beforehand(build or self._kernel, build or self._guest)
        with made as primitive:
            result = attack(primitive, beforehand, victim.victim("=" in how), self._control.victim())
        self.found[name] = result.to_json()

    def _kind(self, stack: ExitStack, which: str) -> None:
        kind, _, other = which.rstrip("+=%").partition("@")
        how = which[len(kind) :]
        if other:
            self._other_kernel(stack, kind, *other.split(","))
            return
        victim = start(stack, kind, self._boot)
        self._note(kind, victim, KcorePrimitive() if "%" in how else ModulePrimitive(), how=how)
        if kind == "secretmem-bridge":
            self._note(f"{kind}, kcore", victim, KcorePrimitive())
        if kind == "reserved":
            for name, secret in self._drives.items():
                if secret.pop("disk") not in victim.said:
                    raise SystemExit(f"the guest did not read its {name} drive: {victim.said}")
                how_far = "=" if name == "direct" else ""
                self._note(f"{kind}, {name} drive", Planted(victim.pid, **secret), ModulePrimitive(), how=how_far)
        if "+" in how:
            self._more(kind, victim)

    def _other_kernel(self, stack: ExitStack, kind: str, kernel: str, learnt: str) -> None:
        victim = start(stack, kind, replace(self._boot, kernel=kernel))
        with ModulePrimitive() as primitive:
            result = attack(primitive, Beforehand(self._kernel, known(Path(learnt))), victim.victim(), None)
        self.found[f"{kind}, another kernel"] = result.to_json()

    def _more(self, kind: str, victim: Planted) -> None:
        self.found[f"{kind}, by command"] = by_command(self._learnt, victim, self._control)
        self._note(f"{kind}, user memory", victim, ModulePrimitive(user_memory=True))
        self._note(f"{kind}, kcore", victim, KcorePrimitive())
        self._note(f"{kind}, wrong", victim, ModulePrimitive(), wrong(self._kernel))
        fd = alias(victim.pid)
        self._note(f"{kind}, aliased", victim, ModulePrimitive())
        self._note(f"{kind}, aliased, kcore", victim, KcorePrimitive())
        os.close(fd)


if __name__ == "__main__":
    attacks = Attacks(json.loads(Path(sys.argv[1]).read_bytes()))
    attacks.run(sys.argv[2:])
    print(json.dumps(attacks.found))
