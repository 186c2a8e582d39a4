"""Kvm, Vm and Vcpu against a real KVM, and the backends as guest memory."""

import errno
import os
import subprocess
import sys

import pytest

from offmap.errors import BackendRefused, KernelError
from offmap.kvm import Kvm, Vm
from offmap.memory.anon import Anon
from offmap.memory.guest_memfd import GuestMemfd
from offmap.memory.memfd import Memfd
from offmap.memory.probe import try_page
from offmap.memory.secretmem import memfd_secret, secret_backing
from offmap.uapi import kvm as uapi
from offmap.vmm.cpuid import PVCLOCK_FEATURES, enabled_xstate, guest_cpuid

from .conftest import descriptors
from .real_mode import CODE, load, point_at

pytestmark = pytest.mark.kvm

HLT = b"\xf4"


def test_system_facts(kvm: Kvm) -> None:
    assert kvm.check_extension(uapi.KVM_CAP_USER_MEMORY) == 1
    assert kvm.check_extension(uapi.KVM_CAP_MAX_VCPUS) >= 16
    assert kvm.check_extension(0x7FFF_FFFF) == 0
    assert kvm.vcpu_mmap_size() >= 8192
    assert not os.get_inheritable(kvm.fd)
    leaves = kvm.supported_cpuid()
    assert {0, 1, uapi.KVM_CPUID_SIGNATURE, uapi.KVM_CPUID_FEATURES} <= {e.function for e in leaves}
    (signature,) = [e for e in leaves if e.function == uapi.KVM_CPUID_SIGNATURE]
    assert signature.ebx.to_bytes(4, "little") == b"KVMK"


def test_registers_and_cpuid_come_back_as_they_were_set(kvm: Kvm, vm: Vm) -> None:
    with vm.create_vcpu(0) as vcpu:
        regs = vcpu.get_regs()
        regs.rax, regs.r15, regs.rip = 0x1122334455667788, (1 << 64) - 1, 0xFFF0
        vcpu.set_regs(regs)
        assert bytes(vcpu.get_regs()) == bytes(regs)
        sregs = vcpu.get_sregs()
        assert sregs.cs.selector == 0xF000, "the state at reset"
        sregs.cr3 = 0x9000
        vcpu.set_sregs(sregs)
        assert vcpu.get_sregs().cr3 == 0x9000
        vcpu.set_cpuid(
            guest_cpuid(kvm.supported_cpuid(), vcpu=0, vcpus=1, kvm_clock=False, nested=False, tsc_deadline=False)
        )
        vcpu.set_msrs({0x1A0: 1, 0x2FF: 0xC06})
        assert vcpu.tsc_khz() > 100_000


def test_msrs_that_are_not_taken_are_named(vm: Vm) -> None:
    with vm.create_vcpu(0) as vcpu, pytest.raises(KernelError, match=r"KVM_SET_MSRS of MSR 0xdead0001"):
        vcpu.set_msrs({0x1A0: 1, 0xDEAD0001: 1})


def test_state_components_that_the_cpuid_has_can_be_enabled(kvm: Kvm, vm: Vm) -> None:
    cpuid = kvm.supported_cpuid()
    xcr0 = enabled_xstate(cpuid)
    if xcr0 is None:
        pytest.skip("this processor has no XSAVE: its state components could not be enabled")
    with vm.create_vcpu(0) as vcpu:
        vcpu.set_cpuid(cpuid)
        vcpu.set_xcr0(xcr0)
        with pytest.raises(KernelError, match="KVM_SET_XCRS failed: Invalid argument"):
            vcpu.set_xcr0(xcr0 | 1 << 62)


def test_pv_features_can_be_enforced(kvm: Kvm, vm: Vm) -> None:
    if not kvm.check_extension(uapi.KVM_CAP_ENFORCE_PV_FEATURE_CPUID):
        pytest.skip("this KVM has no KVM_CAP_ENFORCE_PV_FEATURE_CPUID: its enforcement was not tested")
    with vm.create_vcpu(0) as vcpu:
        vcpu.enable_cap(uapi.KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1)
        vcpu.set_cpuid([uapi.kvm_cpuid_entry2(uapi.KVM_CPUID_FEATURES, eax=0x01007FFB & ~PVCLOCK_FEATURES)])
        with pytest.raises(KernelError, match="KVM_ENABLE_CAP failed"):
            vcpu.enable_cap(0x7FFF)


def test_errors_name_the_call(vm: Vm) -> None:
    with pytest.raises(KernelError, match=r"KVM_SET_USER_MEMORY_REGION failed: Invalid argument \(EINVAL\)") as caught:
        vm.set_user_memory_region(0, 1, 4096, 0)
    assert caught.value.errno == errno.EINVAL
    with vm.create_vcpu(0), pytest.raises(KernelError, match="KVM_CREATE_VCPU failed"):
        vm.create_vcpu(0)
    with pytest.raises(KernelError, match="KVM_IRQ_LINE failed"):
        vm.irq_line(4, True)  # no interrupt controller


def test_interrupt_controllers(vm: Vm) -> None:
    vm.create_irqchip()
    with vm.create_vcpu(0) as vcpu:
        vm.irq_line(4, True)
        vm.irq_line(4, False)
        lapic = vcpu.get_lapic()
        assert len(lapic) == 0x400
        lapic[0x350] = 0x10
        vcpu.set_lapic(lapic)
        event = os.eventfd(0)
        try:
            vm.irqfd(event, 5)
            vm.ioeventfd(event, 0x700, 1, pio=True)
        finally:
            os.close(event)


def test_statistics_describe_themselves(kvm: Kvm, vm: Vm) -> None:
    if not kvm.check_extension(uapi.KVM_CAP_BINARY_STATS_FD):
        with pytest.raises(KernelError, match="KVM_GET_STATS_FD failed"):
            vm.stats()
        assert vm.mapped_pages() is None
        pytest.skip("this KVM has no KVM_CAP_BINARY_STATS_FD: its statistics were not read")
    before = descriptors()
    stats = vm.stats()
    assert {"pages_4k", "pages_2m", "pages_1g", "remote_tlb_flush"} <= set(stats)
    assert all(len(values) == 1 for name, values in stats.items() if name.startswith("pages_"))
    assert str(vm.mapped_pages()) == "nothing mapped"  # there is no memory yet
    assert descriptors() == before


def test_closing_twice_is_harmless_and_complete(kvm: Kvm) -> None:
    before = descriptors()
    vm = kvm.create_vm()
    vcpu = vm.create_vcpu(0)
    for handle in (vcpu, vm, vcpu, vm):
        handle.close()
    assert descriptors() == before


@pytest.mark.parametrize("backend", [Anon(), Memfd()], ids=["anon", "memfd"])
def test_one_instruction_from_memory_of_each_kind(vm: Vm, backend: Anon | Memfd) -> None:
    before = descriptors()
    (backing,) = backend.allocate(vm, 4096)
    try_page(lambda _vm: backing)
    backing.close()
    assert descriptors() == before


def test_one_instruction_from_a_guest_memfd(vm: Vm) -> None:
    try:
        (backing,) = GuestMemfd().allocate(vm, 4096)
    except BackendRefused as error:
        pytest.skip(f"guest_memfd was not tested: {error}")
    with backing:
        assert backing.guest_memfd is not None
        backing.view[0] = HLT[0]
        vm.set_user_memory_region2(0, CODE, 4096, backing.address, backing.guest_memfd, 0)
        with vm.create_vcpu(0) as vcpu:
            point_at(vcpu, CODE)
            assert vcpu.run() == uapi.KVM_EXIT_HLT
    assert not [name for name in descriptors() if "guest_memfd" in name]


def test_secret_memory_is_run_from_or_refused(kvm: Kvm) -> None:
    try:
        os.close(memfd_secret())
    except BackendRefused as error:
        pytest.skip(f"memfd_secret memory in a guest was not tested: {error}")
    with secret_backing(4096) as page:
        try:
            try_page(lambda _vm: page)
        except KernelError as error:
            assert error.errno == errno.EFAULT  # GUP's refusal, which the backend reports as such


def test_memory_that_is_not_there_is_an_error_and_no_crash(vm: Vm) -> None:
    vcpu, memory = load(vm, HLT)
    with vcpu, memory:
        memory.close()
        try:
            reason = vcpu.run()
        except KernelError as error:
            assert str(error) == "KVM_RUN failed: Bad address (EFAULT)"
        else:  # of a KVM that emulates every instruction
            assert reason == uapi.KVM_EXIT_INTERNAL_ERROR


def test_no_permission_is_one_line_with_the_remedy(kvm: Kvm) -> None:
    if os.geteuid() or os.stat("/dev/kvm").st_mode & 0o6:  # noqa: PTH116
        pytest.skip("no permission for /dev/kvm was not tested: not root, or everybody may open it")
    program = (
        "import os; from offmap.kvm import Kvm; from offmap.errors import KernelError\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: Kvm()\nexcept KernelError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == (
        "open of /dev/kvm failed: Permission denied (EACCES); run as root, or join the group that owns /dev/kvm\n"
    )
