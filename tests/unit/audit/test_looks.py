"""What is asked again after the walks, and what the answers mean."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from offmap.audit.audit import _Subject
from offmap.audit.btf import Unknown
from offmap.audit.guest_ram import GuestRam, OthersVm, RamRange
from offmap.audit.judge import judge
from offmap.audit.kvm_list import KvmSlot, Vm
from offmap.audit.looks import look_again, vms_under
from offmap.audit.process import Process
from offmap.audit.result import Source
from offmap.audit.verdict import Verdict

from .report.samples import page_counts

VM = Vm(0x1000, 0xA000, "kvm-1", ((0x3000, 2),), (), True, 0, 0, (), ())
RAM = GuestRam((RamRange(0x7F00_0000_0000, 4096, Source.KVM, 0),), (VM,))


def test_a_vm_of_another_address_space_is_another_programs_though_its_slots_are_the_same() -> None:
    def ended(vm: Vm) -> str:
        with Process(os.getpid()) as process:
            return look_again(process, RAM, None, lambda: replace(RAM, vms=(vm,)))[2]

    assert not ended(VM) and not ended(replace(VM, address=0x5000))
    assert "replaced its program" in ended(replace(VM, address=0x5000, memory=0xB000))


def test_a_list_that_a_vmm_makes_unreadable_speaks_against_what_is_named() -> None:
    slot = KvmSlot(0, RAM.ranges[0].va, 4096, False)
    with Process(os.getpid()) as process:

        def under(answer: Sequence[Vm] | Unknown) -> tuple[tuple[Vm, ...], str]:
            def ask(process: Process, links: Mapping[int, str]) -> Sequence[Vm]:
                if isinstance(answer, Unknown):
                    raise answer
                return answer

            return vms_under(RAM.ranges, process, ask)

        has_it = replace(VM, slots=(slot,))
        assert under([VM, has_it]) == ((has_it,), "")
        assert under([]) == under(OthersVm("its VM was made by another")) == ((), "")
        assert under(Unknown("KVM's slots are being changed")) == ((), "KVM's slots are being changed")
        # At the end too.
        again = replace(RAM, vms=(), unlisted="KVM's slots are being changed")
        ram, _, _ = look_again(process, replace(RAM, vms=()), None, lambda: again)
    pages = page_counts(ram_pages=1, pages_populated=1)
    assert judge(pages, RAM, None)[0] is Verdict.HIDDEN
    assert judge(pages, ram, None)[0] is Verdict.UNKNOWN


def test_a_kernel_that_has_no_list_does_not_speak_against_what_is_named() -> None:
    class Unreadable:
        guest_memfd_pages = of_memory = None

        def memory_of(self, tid: int) -> int:
            raise Unknown("KVM's slots are being changed")

    nothing: Any = None
    unreadable: Any = Unreadable()
    with Process(os.getpid()) as process:
        for kvm, why in ((None, ""), (unreadable, "KVM's slots are being changed")):
            subject = _Subject(process, nothing, nothing, kvm, "no BTF", {"ranges": RAM.ranges})
            ram = subject._find(None)
            assert (ram.ranges, ram.vms, ram.unlisted) == (RAM.ranges, (), why)
