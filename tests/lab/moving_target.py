"""Audits of guests whose page the kernel maps all the time, at another address each moment; run in a disposable host.

``python -m tests.lab.moving_target ATTACK COUNT SECONDS [VMMS]`` audits a VMM with such a guest so often, each time for
so long (``--for``). It prints one JSON object: how often each verdict was given; ``hidden`` is wrong. With VMMS, that
many are audited at once, with an honest VM and one on ordinary memory. ATTACK is one of

- ``page``: a page of hidden memory is mapped a second time before the first mapping goes (needs ``offmap_alias.ko``);
- ``nested``: a guest that executes VMRUN for ever, so that KVM maps its VMCB many times a second, for microseconds. On
  memory without ``struct page`` that panics a host before 6.13: there only ``page`` can be tried.
"""

import json
import os
import struct
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from offmap.audit.audit import snapshot_processes
from offmap.errors import OffmapError
from offmap.kvm import Kvm

from .kvm_attack_target import Attacker, address, exposed, hidden, kept, nothing
from .nested_target import CODE, IDENTITY_4M, PAGE_DIRECTORY, PROGRAM, VMCB, set_up, start

MIB = 1 << 20
DEVICE = "/dev/offmap-alias"


def page(_number: int) -> None:
    """The decoy's page moves: at each instant one of the two files has it mapped."""

    def mapped() -> int:
        fd = os.open(DEVICE, os.O_RDWR)
        os.write(fd, f"memremap {Attacker.decoy_ram + MIB:#x} 4096".encode())
        return fd

    def work() -> None:
        last = mapped()
        ready.set()
        while True:
            following = mapped()
            os.close(last)
            last = following

    ready = threading.Event()
    threading.Thread(target=work, daemon=True).start()
    ready.wait()


def nested(number: int) -> None:
    """A guest of the attacker's own, on hidden memory that no other has."""
    memory = hidden(4 * MIB, (32 + 4 * number) * MIB)
    kvm = Kvm()
    vm = kvm.create_vm()
    vm.set_user_memory_region(0, 0, len(memory), address(memory))
    memory[CODE : CODE + len(PROGRAM)] = PROGRAM
    memory[PAGE_DIRECTORY : PAGE_DIRECTORY + 4] = struct.pack("<I", IDENTITY_4M)
    memory[VMCB : VMCB + 4] = bytes(4)
    vcpu = vm.create_vcpu(0)
    set_up(kvm, vcpu)
    kept.extend((kvm, vm, vcpu))

    def work() -> None:
        while True:
            start(vcpu, 1 << 30)
            vcpu.run()

    threading.Thread(target=work, daemon=True).start()


def main() -> int:
    attack, count, seconds = {"page": page, "nested": nested}[sys.argv[1]], int(sys.argv[2]), float(sys.argv[3])
    vmms = int(sys.argv[4]) if len(sys.argv) > 4 else 1
    deeds: list[tuple[str, Callable[[], None]]] = [("attackers", partial(attack, number)) for number in range(vmms)]
    if len(sys.argv) > 4:
        deeds += [("honest", nothing), ("ordinary", lambda: kept.append(exposed()))]
    found: dict[str, Counter[str]] = {name: Counter() for name, _ in deeds}
    with ExitStack() as stack:
        names = {}
        for name, deed in deeds:
            attacker = stack.enter_context(Attacker(deed))
            if attacker.said != b"!":
                sys.exit(attacker.said.decode())
            names[attacker.pid] = name
        os.setpriority(os.PRIO_PROCESS, 0, -20)  # many guests that never rest share one processor with the auditor
        for _ in range(count):
            for pid, one in snapshot_processes(list(names), seconds=seconds).items():
                found[names[pid]][str(one) if isinstance(one, OffmapError) else one.audit.verdict.value] += 1
            print(json.dumps(found), file=sys.stderr, flush=True)  # for who ends a long run
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
