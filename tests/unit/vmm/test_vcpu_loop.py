"""When a guest is entered again after KVM could not deliver an event to it."""

from typing import cast

from offmap.devices.bus import MmioBus, PioBus
from offmap.kvm import Vcpu
from offmap.uapi.kvm import kvm_regs
from offmap.vmm.vcpu_loop import VcpuLoop


class Registers:
    """A vCPU of which only these are asked for."""

    def __init__(self) -> None:
        self.rip = 0x1000

    def get_regs(self) -> kvm_regs:
        regs = kvm_regs()
        regs.rip = self.rip
        return regs


def test_a_guest_that_makes_no_headway_is_not_entered_for_ever() -> None:
    vcpu = Registers()
    loop = VcpuLoop(cast(Vcpu, vcpu), PioBus(), MmioBus())
    tries = 0
    while loop._may_enter_again():
        tries += 1
    assert tries == 100
    vcpu.rip += 2
    assert loop._may_enter_again()


def test_a_guest_that_gets_on_is_entered_however_often() -> None:
    vcpu = Registers()
    loop = VcpuLoop(cast(Vcpu, vcpu), PioBus(), MmioBus())
    for _ in range(1000):
        vcpu.rip += 1
        assert loop._may_enter_again()
