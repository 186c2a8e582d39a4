"""What is taken out of CPUID, and what is left."""

import struct

from offmap.uapi import kvm
from offmap.wrap.cpuid import remove

CLOCK = 1 << 0 | 1 << 3 | 1 << 24
HYPERV_INTERFACE = int.from_bytes(b"Hv#1", "little")


def leaf(function: int, signature: bytes = bytes(12), **registers: int) -> kvm.kvm_cpuid_entry2:
    ebx, ecx, edx = struct.unpack("<III", signature)
    entry = kvm.kvm_cpuid_entry2(function=function, ebx=ebx, ecx=ecx, edx=edx)
    for name, value in registers.items():
        setattr(entry, name, value)
    return entry


def test_the_clock_is_taken_out_wherever_the_leaves_of_kvm_are() -> None:
    for base in (0x40000000, 0x40000100, 0x4000FF00):
        signature, features = leaf(base, b"KVMKVMKVM\0\0\0"), leaf(base + 1, eax=CLOCK | 1 << 5)
        remove([features, signature])
        assert (features.eax, signature.ebx) == (1 << 5, int.from_bytes(b"KVMK", "little"))


def test_the_leaves_of_hyperv_stay_as_they_are() -> None:
    entries = [
        leaf(0x40000000, b"Microsoft Hv"),
        leaf(0x40000001, eax=HYPERV_INTERFACE),
        leaf(0x40000100, b"KVMKVMKVM\0\0\0"),
        leaf(0x40000101, eax=CLOCK),
    ]
    remove(entries)
    assert [entries[1].eax, entries[3].eax] == [HYPERV_INTERFACE, 0]


def test_nesting_is_taken_out() -> None:
    intel, amd = leaf(1, ecx=1 << 5 | 1), leaf(0x80000001, ecx=1 << 2 | 1)
    remove([intel, amd])
    assert (intel.ecx, amd.ecx) == (1, 1)
