"""The virtio devices of a machine: their register pages, interrupt lines, and connections to KVM."""

import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from ctypes import addressof, c_char
from functools import partial

from offmap.devices.bus import MmioBus
from offmap.devices.virtio.device import DeviceSpec, Surroundings, VirtioDevice
from offmap.devices.virtio.dma import Dma
from offmap.devices.virtio.interrupts import Interrupts, InterruptStatus
from offmap.devices.virtio.mmio import MmioTransport
from offmap.errors import OffmapError
from offmap.kvm.coalesced import CoalescedRing
from offmap.memory.guest import DEVICE_SLOTS, GuestAddressError, GuestMemory
from offmap.memory.iomem import PhysicalRange
from offmap.owned import Owned
from offmap.typed import NamedTuple
from offmap.uapi import kvm as uapi
from offmap.uapi.page import PAGE_SIZE
from offmap.uapi.virtio.mmio import VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_QUEUE_NOTIFY

VIRTIO_MMIO_BASE = 0xD000_0000
"""The first device's registers: in the hole below 4 GiB that no RAM is in (memory/guest.py), below the APICs."""

VIRTIO_MMIO_SIZE = PAGE_SIZE

_PAGES = 0xA0000
"""Which memory of the guest's the register pages are: VGA's on a PC, which its E820 map leaves out."""

_GSIS = (5, 6, 9, 10, 11, 3, 12, 14, *range(16, 24))
"""The free inputs of the IO-APIC, which has 24. Those that a kernel without ACPI reaches through the 8259s come first.
Left out: 0 and 2 (timer, cascade), 1, 4 (COM1), 7 and 15 (where an 8259 puts spurious interrupts), 8 (RTC), 13 (the
FPU's)."""

MAX_DEVICES = len(_GSIS)


class Place(NamedTuple):
    """Where the guest finds a device: guest-physical address and bytes of its registers, and its interrupt line."""

    address: int
    size: int
    gsi: int

    @property
    def parameter(self) -> str:
        """For the command line of a kernel that does not find it by ACPI (CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES)."""
        return f"virtio_mmio.device={self.size >> 10}K@{self.address:#x}:{self.gsi}"


class VirtioBus(Owned):
    """All virtio devices of one machine, connected to KVM. Owns the devices, their threads and eventfds.

    Interrupts are edges: an eventfd that KVM turns into a pulse (irqfd). A level-triggered line must be lowered after
    the driver's acknowledgement, which costs an exit or a resampling eventfd for each interrupt. Devices do not share
    lines, so none needs a level.

    Args:
        specs: name (for people) and what to make, in the order of their places.
        surroundings: what they are made in.
        excluded: guest-physical ranges that no device may touch.
        mmio: where the registers' writes arrive.
        area: the mapping of any vCPU.

    Attributes:
        devices: as made from `specs`.
        transports: what each is behind.
        places: where each is.
        dma: the memory that they may reach.

    Raises:
        OffmapError: a device cannot be had, there are more than interrupt lines, or KVM refuses.
    """

    def __init__(
        self,
        specs: Sequence[tuple[str, DeviceSpec]],
        surroundings: Surroundings,
        excluded: Iterable[PhysicalRange],
        mmio: MmioBus,
        area: mmap.mmap,
    ) -> None:
        if len(specs) > MAX_DEVICES:
            raise OffmapError(f"a guest cannot have {len(specs)} virtio devices", f"give it {MAX_DEVICES} at most")
        self._vm = surroundings.vm
        self._say = surroundings.say
        self.places = [
            Place(VIRTIO_MMIO_BASE + number * VIRTIO_MMIO_SIZE, VIRTIO_MMIO_SIZE, _GSIS[number])
            for number in range(len(specs))
        ]
        self.devices: list[VirtioDevice] = []
        self.transports: list[MmioTransport] = []
        with ExitStack() as self._building:
            aside = PhysicalRange(_PAGES, _PAGES + len(specs) * VIRTIO_MMIO_SIZE)
            self.dma = Dma(surroundings.memory.regions, [*excluded, aside])
            self._building.callback(self.dma.release)
            for _, spec in specs:
                self.devices.append(self._building.enter_context(spec.build(surroundings)))
            if specs:
                self._interrupts = Interrupts(self._ring(area))
                pages = self._pages(surroundings.memory)
                for (name, _), device, place in zip(specs, self.devices, self.places, strict=True):
                    start = place.address - VIRTIO_MMIO_BASE
                    page = pages[start : start + place.size]
                    self._building.callback(page.release)
                    transport = self._connect(name, device, place, page)
                    self.transports.append(transport)
                    mmio.attach(place.address, place.size, transport)
            self._owned = self._building.pop_all()

    def _ring(self, area: mmap.mmap) -> CoalescedRing | None:
        if not self._vm.check_extension(uapi.KVM_CAP_COALESCED_MMIO):
            return None
        for place in self.places:
            self._vm.coalesced_mmio(place.address + VIRTIO_MMIO_INTERRUPT_ACK, 4)
        ring = CoalescedRing(area)
        self._building.callback(ring.release)
        return ring

    def _pages(self, memory: GuestMemory) -> memoryview:
        """The register pages, in one memory slot that the guest can read; without such slots, reads are exits.

        They lie in the guest's own memory. The kernel may move ordinary memory, and KVM then counts memory exchanged
        under a slot, which speaks against a VM that hides its guest (audit/seen.py). A guest that writes there by its
        other address misleads nobody but itself: we only write them.
        """
        size = len(self.places) * VIRTIO_MMIO_SIZE
        try:
            view = memory.view(_PAGES, size)
        except GuestAddressError:  # too small for that
            view = memoryview(self._building.enter_context(mmap.mmap(-1, size)))
        self._building.callback(view.release)
        if self._vm.check_extension(uapi.KVM_CAP_READONLY_MEM):
            address = addressof(c_char.from_buffer(view))
            self._vm.set_user_memory_region(DEVICE_SLOTS, VIRTIO_MMIO_BASE, size, address, readonly=True)
        return view

    def _connect(self, name: str, device: VirtioDevice, place: Place, page: memoryview) -> MmioTransport:
        """Make the transport of one device, and let KVM answer its notifications."""
        irq = self._eventfd()
        self._vm.irqfd(irq, place.gsi)

        def make_status(show: Callable[[int], None]) -> InterruptStatus:
            status = InterruptStatus(self._interrupts, show, partial(os.eventfd_write, irq, 1), irq)
            self._interrupts.register(place.address + VIRTIO_MMIO_INTERRUPT_ACK, status)
            return status

        kicks = [self._eventfd() for _ in device.queue_sizes]
        transport = MmioTransport(name, device, page, self.dma, make_status, self._say, start=False)
        self._building.callback(transport.quiesce)  # before its fds are closed
        for number, kick in enumerate(kicks):
            self._vm.ioeventfd(kick, place.address + VIRTIO_MMIO_QUEUE_NOTIFY, 4, datamatch=number)
            transport.watch_kicks(number, kick)
        return transport

    def _eventfd(self) -> int:
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._building.callback(os.close, fd)
        return fd

    def start(self, first: Callable[[VirtioDevice], None] = lambda _: None) -> None:
        """Start the devices' threads. Each runs `first` with its device before all else.

        Raises:
            OffmapError: this process may start no more threads.
        """
        for transport, device in zip(self.transports, self.devices, strict=True):
            transport.worker.start(partial(first, device))

    def pause(self) -> None:
        """Have every device leave guest memory alone until `resume`. No vCPU may be running."""
        for transport in self.transports:
            transport.pause()

    def resume(self) -> None:
        """Let the devices go on."""
        for transport in self.transports:
            transport.resume()

    @property
    def is_on_a_worker(self) -> bool:
        """Whether the caller is on the thread of one of the devices."""
        return any(transport.worker.is_current for transport in self.transports)

    def close(self) -> None:
        """Stop the devices, whatever they do, and free everything. No vCPU may be running, and no device be paused."""
        self._owned.close()
