"""Guest writes that KVM notes down in a ring instead of leaving the guest for them (KVM_REGISTER_COALESCED_MMIO)."""

import mmap
from collections.abc import Iterator

from offmap.uapi.kvm import KVM_COALESCED_MMIO_MAX, KVM_COALESCED_MMIO_PAGE_OFFSET
from offmap.uapi.page import PAGE_SIZE

# As 32-bit words: struct kvm_coalesced_mmio_ring is first, last, then an array of struct kvm_coalesced_mmio, each
# phys_addr (two words), len, pio, data[8].
_FIRST, _LAST = 0, 1
_ENTRIES = 2
_ENTRY_WORDS = 6
_LENGTH, _DATA = 2, 4


class CoalescedRing:
    """The ring of one VM. Its reader must be one thread at a time.

    Args:
        area: the mapping of any vCPU of the VM.
    """

    def __init__(self, area: mmap.mmap | memoryview) -> None:
        start = KVM_COALESCED_MMIO_PAGE_OFFSET * PAGE_SIZE
        self._words = memoryview(area)[start : start + PAGE_SIZE].cast("I")

    def waiting(self) -> bool:
        """Whether there is anything to take."""
        words = self._words
        return words[_FIRST] != words[_LAST]

    def take(self) -> Iterator[tuple[int, int]]:
        """The (address, value) of each recorded write of 4 bytes, in order; they are then forgotten.

        Those that come meanwhile wait for the next call: a guest may write as quickly as they are taken.

        KVM publishes an entry before it moves `last`, and takes it for free once `first` has moved (x86 keeps the order
        of stores, and that of loads).
        """
        words = self._words
        first, last = words[_FIRST], words[_LAST]
        while first != last:
            entry = _ENTRIES + _ENTRY_WORDS * first
            address = words[entry] | words[entry + 1] << 32
            length, value = words[entry + _LENGTH], words[entry + _DATA]
            words[_FIRST] = first = (first + 1) % KVM_COALESCED_MMIO_MAX
            if length == 4:
                yield address, value

    def release(self) -> None:
        """Let go of the mapping."""
        self._words.release()
