"""CPUID leaves as KVM exchanges them: ``struct kvm_cpuid2``, with its entries."""

from ctypes import sizeof

from offmap.uapi.kvm import kvm_cpuid2, kvm_cpuid_entry2


def pack_cpuid(entries: list[kvm_cpuid_entry2], room: int = 0) -> bytearray:
    """A ``struct kvm_cpuid2`` of `entries`, followed by room for more, up to `room` entries together."""
    empty = max(room - len(entries), 0)
    packed = b"".join(map(bytes, [kvm_cpuid2(len(entries) + empty), *entries]))
    return bytearray(packed + bytes(empty * sizeof(kvm_cpuid_entry2)))


def unpack_cpuid(buffer: bytes | bytearray) -> list[kvm_cpuid_entry2]:
    """The entries of a ``struct kvm_cpuid2`` that the kernel filled in."""
    count = kvm_cpuid2.from_buffer_copy(buffer).nent
    start, size = sizeof(kvm_cpuid2), sizeof(kvm_cpuid_entry2)
    return [kvm_cpuid_entry2.from_buffer_copy(buffer, start + number * size) for number in range(count)]
