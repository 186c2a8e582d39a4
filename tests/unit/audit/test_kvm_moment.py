"""A list of VMs that was read for many processes: what is taken from it is what the list says of one alone."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from offmap.audit.btf import Unknown
from offmap.audit.guest_ram import OthersVm
from offmap.audit.kvm_list import Vm
from offmap.audit.kvm_moment import Moment, unlisted
from offmap.audit.process import Process
from offmap.audit.tasks import Thread

from .test_guest_ram import HoldsVm

PID, MM, TASK = os.getpid(), 0xA000, 0x7000


def vm(address: int, memory: int = MM) -> Vm:
    return Vm(address, memory, "kvm-1", (), (), True, 0, 0, (), ())


class List:
    """KVM's list and the kernel's tasks, and how often they were read."""

    def __init__(self, *vms: Vm) -> None:
        self.listed = list(vms)
        self.there, self.different, self.kept = True, set[int](), set[int]()
        self.whole = self.single = 0

    def vms(self) -> list[Vm]:
        self.whole += 1
        return list(self.listed)

    def threads(self) -> list[Thread]:
        return [Thread(PID, PID, MM, TASK)]

    def is_there(self, thread: Thread) -> bool:
        return self.there

    def changed(self, vm: Vm) -> bool:
        return vm.address in self.different

    def memory_of(self, tid: int) -> int:
        return MM

    def of_memory(self, memory: int) -> Sequence[Vm]:
        self.single += 1
        return [each for each in self.listed if each.memory == memory]

    def addresses(self) -> Sequence[int]:
        return [each.address for each in self.listed]

    def held(self, tid: int, descriptors: Mapping[int, str], task: int = 0) -> set[int]:
        assert (tid, task) in {(PID, TASK), (PID, 0)}
        return self.kept


def ask(kvm: List, moment: Moment) -> list[int]:
    with HoldsVm(PID) as process:
        return [each.address for each in moment.ask(process, process.descriptors())]


def moment_of(kvm: Any) -> Moment:
    return Moment(kvm)


def test_the_list_is_read_once_for_all() -> None:
    kvm = List(vm(1), vm(2, 0xB000), vm(3))
    moment = moment_of(kvm)
    kvm.kept = {1, 2}  # another's beside its own
    assert ask(kvm, moment) == ask(kvm, moment) == [1, 3]
    assert (kvm.whole, kvm.single) == (1, 0)


@pytest.mark.parametrize("what", ["task", "slots", "ended", "held"])
def test_what_is_not_as_it_was_is_read_anew(what: str) -> None:
    kvm = List(vm(1))
    moment = moment_of(kvm)
    kvm.listed = [vm(5)] if what == "ended" else [vm(1), vm(5)]
    kvm.there = what != "task"
    kvm.different = {1} if what in {"slots", "ended"} else set()
    kvm.kept = {5} if what == "held" else set()
    assert ask(kvm, moment) == [each.address for each in kvm.listed]
    assert kvm.single == 1


def test_a_process_without_a_vm_on_the_list_is_asked_for_alone() -> None:
    kvm = List(vm(2, 0xB000))
    moment = moment_of(kvm)
    kvm.kept = {2}
    with pytest.raises(OthersVm):
        ask(kvm, moment)
    with HoldsVm(PID) as process:
        assert not unlisted(moment, process)  # its maker is told instead
        kvm.kept = {9}
        assert "does not list" in unlisted(moment, process)
        with pytest.raises(Unknown, match="does not list"):
            moment.ask(process, process.descriptors())
    with Process(PID) as process:
        assert not unlisted(moment, process)
