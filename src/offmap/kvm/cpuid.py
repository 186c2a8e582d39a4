"""CPUID leaves as KVM exchanges them: ``struct kvm_cpuid2``."""

import struct
from dataclasses import dataclass

__all__ = ["CpuidEntry", "pack_cpuid", "unpack_cpuid"]

_HEADER = struct.Struct("<II")  # struct kvm_cpuid2: nent, padding
_ENTRY = struct.Struct("<7I12x")  # struct kvm_cpuid_entry2


@dataclass(slots=True)
class CpuidEntry:
    """One leaf (and subleaf, where `flags` says that the index counts)."""

    function: int
    index: int = 0
    flags: int = 0
    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0


def pack_cpuid(entries: list[CpuidEntry], room: int = 0) -> bytearray:
    """A ``struct kvm_cpuid2`` of `entries`, or with `room` an empty one for that many."""
    buffer = bytearray(_HEADER.size + _ENTRY.size * max(len(entries), room))
    _HEADER.pack_into(buffer, 0, max(len(entries), room), 0)
    for number, e in enumerate(entries):
        _ENTRY.pack_into(
            buffer, _HEADER.size + number * _ENTRY.size, e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx
        )
    return buffer


def unpack_cpuid(buffer: bytes | bytearray) -> list[CpuidEntry]:
    """The entries of a ``struct kvm_cpuid2`` that the kernel filled in."""
    count, _ = _HEADER.unpack_from(buffer)
    return [CpuidEntry(*_ENTRY.unpack_from(buffer, _HEADER.size + n * _ENTRY.size)) for n in range(count)]
