"""What is asked again after the walks, and what the answers mean."""

import os
from dataclasses import replace

from offmap.audit.guest_ram import GuestRam, RamRange
from offmap.audit.kvm_list import Vm
from offmap.audit.looks import look_again
from offmap.audit.process import Process
from offmap.audit.result import Source

VM = Vm(0x1000, 0xA000, "kvm-1", ((0x3000, 2),), (), True, 0, 0, (), ())
RAM = GuestRam((RamRange(0x7F00_0000_0000, 4096, Source.KVM, 0),), (VM,))


def test_a_vm_of_another_address_space_is_another_programs_though_its_slots_are_the_same() -> None:
    def ended(vm: Vm) -> str:
        with Process(os.getpid()) as process:
            return look_again(process, RAM, None, lambda: replace(RAM, vms=(vm,)))[2]

    assert not ended(VM) and not ended(replace(VM, address=0x5000))
    assert "replaced its program" in ended(replace(VM, address=0x5000, memory=0xB000))
