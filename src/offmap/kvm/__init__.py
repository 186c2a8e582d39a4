"""Typed handles on /dev/kvm: each owns an fd and turns errno into our errors."""

from offmap.kvm.system import Kvm
from offmap.kvm.vcpu import Vcpu
from offmap.kvm.vm import Vm

__all__ = ["Kvm", "Vcpu", "Vm"]
