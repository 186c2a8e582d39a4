"""The CPUID that a guest sees."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offmap.kvm.vcpu import pack_cpuid, unpack_cpuid
from offmap.uapi import kvm as uapi
from offmap.vmm.cpuid import enabled_xstate, guest_cpuid

ALL = 0xFFFFFFFF
CpuidEntry = uapi.kvm_cpuid_entry2
INDEXED = uapi.KVM_CPUID_FLAG_SIGNIFCANT_INDEX
SUPPORTED = [
    CpuidEntry(0x0, eax=0x1F),
    CpuidEntry(0x1, eax=0x906EA, ebx=0x12345678, ecx=ALL, edx=ALL),
    CpuidEntry(0x4, 0, INDEXED, eax=0xFC004121, ebx=1, ecx=2, edx=3),
    CpuidEntry(0x4, 1, INDEXED, eax=0, ebx=1, ecx=2, edx=3),
    CpuidEntry(0x7, 0, INDEXED, ebx=ALL),
    CpuidEntry(0xB, 0, INDEXED, eax=1, ebx=2, ecx=0x100, edx=9),
    CpuidEntry(0xB, 1, INDEXED, eax=5, ebx=32, ecx=0x201, edx=9),
    CpuidEntry(0x1F, 0, INDEXED, eax=1, ebx=2, ecx=0x100, edx=9),
    CpuidEntry(uapi.KVM_CPUID_SIGNATURE, eax=uapi.KVM_CPUID_FEATURES, ebx=0x4B4D564B),
    CpuidEntry(uapi.KVM_CPUID_FEATURES, eax=ALL, edx=ALL),
    CpuidEntry(0x80000001, ecx=ALL, edx=ALL),
    CpuidEntry(0x80000008, eax=0x3030, ecx=0x7007),
    CpuidEntry(0x8000000A, eax=1, ebx=8, edx=ALL),
    CpuidEntry(0x8000001E, eax=7, ebx=0x107, ecx=0x301),
]


def leaf(guest: list[CpuidEntry], function: int, index: int = 0) -> CpuidEntry:
    (found,) = [e for e in guest if e.function == function and e.index == index]
    return found


def guest(
    vcpu: int = 0, vcpus: int = 1, kvm_clock: bool = False, nested: bool = False, tsc_deadline: bool = False
) -> list[CpuidEntry]:
    return guest_cpuid(SUPPORTED, vcpu=vcpu, vcpus=vcpus, kvm_clock=kvm_clock, nested=nested, tsc_deadline=tsc_deadline)


@pytest.mark.parametrize("kvm_clock", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_what_maps_guest_pages_is_gone_unless_it_is_wanted(kvm_clock: bool, nested: bool) -> None:
    cpuid = guest(kvm_clock=kvm_clock, nested=nested)
    features = leaf(cpuid, uapi.KVM_CPUID_FEATURES).eax
    assert features == ALL if kvm_clock else ALL & ~(1 << 0 | 1 << 3 | 1 << 24)
    vmx, svm = leaf(cpuid, 1).ecx >> 5 & 1, leaf(cpuid, 0x80000001).ecx >> 2 & 1
    assert (vmx, svm) == (nested, nested)
    assert any(e.function == 0x8000000A for e in cpuid) == nested
    # And nothing else with them.
    assert leaf(cpuid, 1).ecx | 1 << 5 == ALL
    assert leaf(cpuid, 0x80000001).ecx | 1 << 2 == ALL
    assert leaf(cpuid, 7).ebx == ALL


@pytest.mark.parametrize("vcpus", range(1, 17))
def test_topology_is_one_socket_of_as_many_cores(vcpus: int) -> None:
    apic_ids = set()
    for vcpu in range(vcpus):
        cpuid = guest(vcpu, vcpus)
        one = leaf(cpuid, 1)
        assert (one.ebx >> 24, one.ebx >> 16 & 0xFF, one.ebx & 0xFFFF) == (vcpu, vcpus, 0x5678)
        smt, core, end = (leaf(cpuid, 0xB, n) for n in range(3))
        assert all(level.edx == vcpu and level.flags & INDEXED for level in (smt, core, end))
        assert (smt.eax, smt.ebx, smt.ecx) == (0, 1, 0x100)
        assert (core.ebx, core.ecx) == (vcpus, 0x201)
        assert (end.eax, end.ebx, end.ecx) == (0, 0, 2)
        # Intel SDM, leaf 0xB: shifted right by this, the x2APIC ids of one package are all equal, and no less will do.
        assert (vcpus - 1) >> core.eax == 0
        assert core.eax == 0 or (vcpus - 1) >> (core.eax - 1)
        apic_ids.add(core.edx)
        cache, none = leaf(cpuid, 4, 0), leaf(cpuid, 4, 1)
        assert (cache.eax >> 26) + 1 >= vcpus
        assert (cache.eax >> 26) + 1 == 1 << core.eax
        assert cache.eax >> 14 & 0xFFF == 0
        assert cache.eax & 0x3FFF == 0xFC004121 & 0x3FFF
        assert bytes(none) == bytes(leaf(SUPPORTED, 4, 1))
        amd = leaf(cpuid, 0x80000008)
        assert (amd.ecx & 0xFF, amd.ecx >> 12 & 0xF) == (vcpus - 1, core.eax)
        assert amd.eax == 0x3030
        extended = leaf(cpuid, 0x8000001E)
        assert (extended.eax, extended.ebx & 0xFF) == (vcpu, vcpu)
        assert not [e for e in cpuid if e.function == 0x1F], "the host's own topology"
    assert apic_ids == set(range(vcpus))


def test_hypervisor_bit_and_tsc_deadline() -> None:
    bare = [CpuidEntry(1)]
    for tsc_deadline in (False, True):
        cpuid = guest_cpuid(bare, vcpu=0, vcpus=1, kvm_clock=False, nested=False, tsc_deadline=tsc_deadline)
        assert leaf(cpuid, 1).ecx == 1 << 31 | tsc_deadline << 24


def test_all_state_components_are_enabled_from_the_start() -> None:
    xsave = CpuidEntry(0x1, ecx=1 << 26)
    components = [
        CpuidEntry(0xD, 0, INDEXED, eax=0x207, ebx=576, edx=1),
        CpuidEntry(0xD, 1, INDEXED, eax=0xF),
    ]
    assert enabled_xstate([xsave, *components]) == 0x1_0000_0207
    assert enabled_xstate([CpuidEntry(0x1), *components]) is None, "a CPU without XSAVE has no XCR0"
    assert enabled_xstate([xsave]) is None


def test_what_kvm_said_is_not_changed() -> None:
    before = [bytes(entry) for entry in SUPPORTED]
    guest(3, 4)
    assert before == [bytes(entry) for entry in SUPPORTED]


WORD = st.integers(0, ALL)


@given(st.lists(st.builds(CpuidEntry, WORD, WORD, WORD, WORD, WORD, WORD, WORD), max_size=20))
def test_packing_loses_nothing(entries: list[CpuidEntry]) -> None:
    packed = pack_cpuid(entries)
    assert len(packed) == 8 + 40 * len(entries)
    assert [bytes(entry) for entry in unpack_cpuid(packed)] == [bytes(entry) for entry in entries]


def test_room_for_the_kernel_to_fill() -> None:
    packed = pack_cpuid([], room=3)
    assert len(packed) == 8 + 3 * 40
    assert [bytes(entry) for entry in unpack_cpuid(packed)] == [bytes(CpuidEntry(0))] * 3
