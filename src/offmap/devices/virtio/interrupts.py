"""InterruptStatus of all devices of a VM. Most acknowledgements cost no exit.

A Linux driver reads InterruptStatus and writes InterruptACK at every interrupt. The read finds the register in a page
that the guest may read (mmio.py); the write is noted down by KVM in a ring (kvm.coalesced). We look at the ring before
we set a bit, or do anything else with a register. Seen from the driver, its acknowledgement then came at the latest
possible moment before the device's next interrupt, as if a bus had delayed it.

No interrupt is lost. A bit is set after the ring was emptied. A later acknowledgement clears the bit only if the driver
has seen it, from this interrupt or an earlier one. The driver then looks at its used rings, or at the configuration.
There it finds what this interrupt was about, because that was written first.
"""

import threading
from collections.abc import Callable

from offmap.kvm.coalesced import CoalescedRing


class InterruptStatus:
    """The register of one device.

    Args:
        show: puts the value where the guest reads it.
        signal: interrupts the guest.
        irq: an eventfd that interrupts the guest too, or -1.
    """

    def __init__(
        self, interrupts: "Interrupts", show: Callable[[int], None], signal: Callable[[], None], irq: int = -1
    ) -> None:
        self._interrupts = interrupts
        self._show = show
        self._signal = signal
        self._value = 0
        self._shown = 0
        self._held = 0
        self.irq = irq

    def hold(self, bits: int) -> None:
        """Show `bits` as set whatever the driver acknowledges, because somebody else signals `irq`. 0 ends it."""
        with self._interrupts.lock:
            self._held = bits
            self._set(self._value)

    def raise_(self, bits: int) -> None:
        """Set `bits` and interrupt the guest. On any thread."""
        with self._interrupts.lock:
            self._interrupts.take_acknowledgements()
            self._set(self._value | bits)
        self._signal()

    def acknowledge(self, bits: int) -> None:
        """The driver has written `bits` to InterruptACK, and that was an exit (no ring, or a full one)."""
        with self._interrupts.lock:
            self._interrupts.take_acknowledgements()
            self._set(self._value & ~bits)

    def reset(self) -> None:
        """The driver has reset the device."""
        with self._interrupts.lock:
            self._interrupts.take_acknowledgements()
            self._set(0)

    def _set(self, value: int) -> None:
        self._value = value = value | self._held
        # Usually the acknowledged bit is set again at once. Then the page need not change.
        if value != self._shown:
            self._shown = value
            self._show(value)

    def acknowledged(self, bits: int) -> None:
        """Clear `bits`. They still show until the register changes. The caller holds the lock."""
        self._value &= ~bits


class Interrupts:
    """The acknowledgements of all devices of one VM.

    Args:
        ring: where KVM notes them down, or None where each is an exit.
    """

    def __init__(self, ring: CoalescedRing | None) -> None:
        self.lock = threading.Lock()
        self._ring = ring
        self._registers: dict[int, InterruptStatus] = {}

    def register(self, address: int, status: InterruptStatus) -> None:
        """Have writes to the guest-physical `address` acknowledge bits of `status`."""
        self._registers[address] = status

    def take_acknowledgements(self) -> None:
        """Clear what the guest has acknowledged; the caller holds the lock."""
        if self._ring is not None and self._ring.waiting():
            for address, bits in self._ring.take():
                if (status := self._registers.get(address)) is not None:
                    status.acknowledged(bits)
