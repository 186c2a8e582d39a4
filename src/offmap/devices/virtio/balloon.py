"""virtio-balloon (virtio 1.2, section 5.5): the guest gives memory back to the host, and can take it again.

The guest inflates the balloon to the size that it is told. It reports free pages by itself (F_REPORTING). When it runs
out of memory, it takes pages back unasked (F_DEFLATE_ON_OOM). A page that it gives leaves the host's RAM at once. When
the guest touches it again, the kernel gives it a new page; the guest need not announce that (F_MUST_TELL_HOST is not
offered). On a backend that hides, the kernel takes the new page off its map as it did the first.
"""

import struct
from collections.abc import Callable, Iterable
from itertools import islice

from offmap.devices.virtio.device import Activation, Surroundings, VirtioDevice
from offmap.devices.virtio.dma import DriverError
from offmap.devices.virtio.iov import address_of
from offmap.devices.virtio.queue import Chain, Queue
from offmap.errors import KernelError, OffmapError
from offmap.memory.backend import BACKENDS
from offmap.memory.guest import GuestMemory
from offmap.options import Options
from offmap.typed import NamedTuple
from offmap.uapi.page import PAGE_SIZE
from offmap.uapi.virtio import balloon as uapi
from offmap.uapi.virtio.config import VIRTIO_ID_BALLOON
from offmap.units import format_size, parse_size

_PFN = struct.Struct("<I")
_ACTUAL = uapi.virtio_balloon_config.actual.offset
_REPORTING_VQ = 4
_MOST_PAGES = 1 << 12  # that one buffer may name: each may be a system call. Linux names 256 at a time
_BATCH = 1024  # pages


class BalloonSpec(NamedTuple):
    """``--balloon size=BYTES``.

    Attributes:
        size: what the guest is to give up from the start, in bytes.
    """

    size: int = 0

    def build(self, surroundings: Surroundings) -> "Balloon":
        """Make the device, if this RAM can be given back at all."""
        memory = surroundings.memory
        if not surroundings.backend.discards:
            can = ", ".join(name for name, backend in BACKENDS.items() if backend.discards)
            raise OffmapError(
                "RAM of this kind cannot go back to the host page by page: a balloon would take it from the guest, and "
                "give it to nobody",
                f"leave --balloon out, or use a backend whose pages are the host's: {can}",
            )
        if self.size >= memory.size:
            raise OffmapError(
                f"a guest of {format_size(memory.size)} cannot give up {format_size(self.size)}", "ask for less"
            )
        if surroundings.hidden:
            # Kernel mappings of free pages (its image's freed parts) are looked for before the guest starts, only then.
            surroundings.say(
                "balloon: pages that the guest takes back leave the direct map like all of its RAM, but nobody looks "
                "for other mappings of them first; --audit=watch would show them"
            )
        return Balloon(memory, self.size // PAGE_SIZE, surroundings.say)


class Balloon(VirtioDevice):
    """The device.

    Args:
        memory: the guest's; its backend can discard.
        pages: of PAGE_SIZE bytes, that the guest is to give up.
        say: takes a line for the user.

    Attributes:
        discarded: bytes given back to the host so far; pages that came and went again count each time.
        actual: pages in the balloon, as the driver says.
    """

    kinds = ("balloon",)
    device_id = VIRTIO_ID_BALLOON
    queue_sizes = (128,) * 5
    features = 1 << uapi.VIRTIO_BALLOON_F_DEFLATE_ON_OOM | 1 << uapi.VIRTIO_BALLOON_F_REPORTING

    def __init__(self, memory: GuestMemory, pages: int, say: Callable[[str], None]) -> None:
        self._memory = memory
        self._pages = pages
        self._say = say
        self._refused = False
        self._activation: Activation | None = None
        self._handlers: dict[int, Callable[[Queue], None]] = {}
        self.discarded = 0
        self.actual = 0

    def config(self) -> bytes:
        """struct virtio_balloon_config."""
        return bytes(uapi.virtio_balloon_config(self._pages, self.actual, 0, 0))

    def write_config(self, offset: int, data: bytes) -> None:
        if offset == _ACTUAL and len(data) == _PFN.size:
            (self.actual,) = _PFN.unpack(data)

    def activate(self, activation: Activation) -> None:
        self._activation = activation
        self._handlers = {0: self._inflate, 1: self._deflate, _REPORTING_VQ: self._take_report}
        if activation.has(uapi.VIRTIO_BALLOON_F_REPORTING):
            # The specification gives each queue its number (5.5.2), and Linux since 6.11 tries that first. Linux before
            # it and QEMU have no gaps: the queue of reports moves up. No driver uses both numbers.
            self._handlers[2] = self._take_report

    def handle(self, queue: int) -> None:
        if self._activation is None:
            return
        found, handler = self._activation.queues[queue], self._handlers.get(queue)
        if found is not None and handler is not None:
            handler(found)
            found.notify()

    def reset(self) -> None:
        self._activation = None
        self._handlers = {}
        self.actual = 0

    # Pages

    def _inflate(self, queue: Queue) -> None:
        for chain in queue.chains():
            queue.charge(chain.readable_bytes // _PFN.size * PAGE_SIZE)
            pages = iter(self._pages_of(chain))
            # A driver may name very many pages, and one page often: take so many at a time.
            while some := list(islice(pages, _BATCH)):
                self._discard(some)
            queue.push(chain, 0)

    def _deflate(self, queue: Queue) -> None:
        """Answer a guest that takes pages back. It gets each page when it touches it."""
        for chain in queue.chains():
            queue.push(chain, 0)

    def _take_report(self, queue: Queue) -> None:
        """Discard reported free pages. The guest does not touch them until it has the buffer back."""
        for chain in queue.chains():
            self._discard((address_of(view), len(view)) for view in chain.writable if len(view))
            queue.push(chain, 0)

    def _pages_of(self, chain: Chain) -> Iterable[tuple[int, int]]:
        """Yield address (in this process) and size of each page that a chain names."""
        if chain.readable_bytes % _PFN.size or chain.writable or self._activation is None:
            raise DriverError(f"names pages in {chain.readable_bytes} bytes, which are not whole numbers")
        if chain.readable_bytes > _MOST_PAGES * _PFN.size:
            raise DriverError(f"names {chain.readable_bytes // _PFN.size} pages in one buffer")
        view = self._activation.dma.view
        for piece in chain.readable:
            if len(piece) % _PFN.size:
                raise DriverError("cuts the number of a page in two")
            for (number,) in _PFN.iter_unpack(piece):
                yield address_of(view(number << uapi.VIRTIO_BALLOON_PFN_SHIFT, PAGE_SIZE)), PAGE_SIZE

    def _discard(self, ranges: Iterable[tuple[int, int]]) -> None:
        for address, size in _merged(ranges):
            try:
                self.discarded += self._memory.discard(address, size)
            except KernelError as error:
                # The guest gave up the page, but the host did not get it. The user must know.
                if not self._refused:
                    self._refused = True
                    self._say(f"balloon: {error}; what the guest gives up may stay in the host's RAM")


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge adjacent (address, size) ranges: each costs a system call."""
    merged: list[tuple[int, int]] = []
    for address, size in sorted(ranges):
        if merged and address <= sum(merged[-1]):
            start, before = merged[-1]
            merged[-1] = start, max(before, address + size - start)
        else:
            merged.append((address, size))
    return merged


def parse_balloon(text: str) -> BalloonSpec:
    """``size=BYTES``: whole pages; 0 leaves it at what the guest reports by itself.

    Raises:
        OffmapError: what cannot be.
    """
    with Options(text, "--balloon", "write it like --balloon size=64M, or size=0; a multiple of 4K") as options:
        size = options.text("size", None, parse_size)
        if size is None:
            options.refuse("it does not say size=")
        if size % PAGE_SIZE:
            options.refuse(f"{format_size(size)} is not a whole number of pages")
    return BalloonSpec(size)
