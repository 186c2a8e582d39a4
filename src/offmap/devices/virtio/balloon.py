"""virtio-balloon (virtio 1.2, section 5.5): memory that the guest does without goes back to the host, and comes again.

The guest inflates the balloon to the size that it is told, and reports free pages by itself (F_REPORTING); when it runs
out of memory, it takes some back unasked (F_DEFLATE_ON_OOM). What it gives leaves the host's RAM at once, and is a new
page when the guest touches it again, which it need not announce (F_MUST_TELL_HOST is not offered): the kernel, not this
device, gives it one, and on a backend that hides takes that off its map as it did with the first.
"""

import struct
from collections.abc import Callable, Iterable
from ctypes import addressof, c_char
from itertools import islice

from offmap.devices.virtio.device import Activation, VirtioDevice
from offmap.devices.virtio.iov import part
from offmap.devices.virtio.queue import Chain, DriverError, Queue
from offmap.errors import KernelError
from offmap.memory.guest import GuestMemory
from offmap.uapi.page import PAGE_SIZE
from offmap.uapi.virtio import balloon as uapi
from offmap.uapi.virtio.config import VIRTIO_ID_BALLOON

__all__ = ["Balloon"]

_PFN = struct.Struct("<I")
_ACTUAL = uapi.virtio_balloon_config.actual.offset
_STAT_SIZE = uapi.VIRTIO_BALLOON_STAT.size
_REPORTING_VQ = 4
_MOST_PAGES = 1 << 16  # that one buffer may name; Linux names 256 at a time, and all of its RAM would take minutes
_BATCH = 1024  # pages
_MOST_STATS = 64  # a driver has 10
_STAT_NAMES = {
    uapi.VIRTIO_BALLOON_S_SWAP_IN: "swap_in",
    uapi.VIRTIO_BALLOON_S_SWAP_OUT: "swap_out",
    uapi.VIRTIO_BALLOON_S_MAJFLT: "major_faults",
    uapi.VIRTIO_BALLOON_S_MINFLT: "minor_faults",
    uapi.VIRTIO_BALLOON_S_MEMFREE: "free_memory",
    uapi.VIRTIO_BALLOON_S_MEMTOT: "total_memory",
    uapi.VIRTIO_BALLOON_S_AVAIL: "available_memory",
    uapi.VIRTIO_BALLOON_S_CACHES: "disk_caches",
}


class Balloon(VirtioDevice):
    """The device.

    Args:
        memory: the guest's; its backend can discard.
        pages: of PAGE_SIZE bytes, that the guest is to give up.
        say: takes a line for the user.

    Attributes:
        discarded: bytes given back to the host so far; pages that came and went again count each time.
        actual: pages in the balloon, as the driver says.
        statistics: what the guest last said of its memory, by name, in its own units (bytes, faults).
    """

    device_id = VIRTIO_ID_BALLOON
    queue_sizes = (128, 128, 16, 128, 128)
    features = (
        1 << uapi.VIRTIO_BALLOON_F_STATS_VQ
        | 1 << uapi.VIRTIO_BALLOON_F_DEFLATE_ON_OOM
        | 1 << uapi.VIRTIO_BALLOON_F_REPORTING
    )

    def __init__(self, memory: GuestMemory, pages: int, say: Callable[[str], None]) -> None:
        self._memory = memory
        self._pages = pages
        self._say = say
        self._refused = False
        self._activation: Activation | None = None
        self._handlers: dict[int, Callable[[Queue], None]] = {}
        self._stats_buffer: Chain | None = None
        self.discarded = 0
        self.actual = 0
        self.statistics: dict[str, int] = {}

    def config(self) -> bytes:
        """struct virtio_balloon_config."""
        return bytes(uapi.virtio_balloon_config(self._pages, self.actual, 0, 0))

    def write_config(self, offset: int, data: bytes) -> None:
        if offset == _ACTUAL and len(data) == _PFN.size:
            (self.actual,) = _PFN.unpack(data)

    def set_target(self, pages: int) -> None:
        """Ask the guest to have so many pages in the balloon. On the worker thread."""
        self._pages = pages
        if self._activation is not None:
            self._activation.config_changed()

    def activate(self, activation: Activation) -> None:
        self._activation = activation
        # Where a feature is missing, Linux up to 6.10 and QEMU let the queues behind its own move up; by the
        # specification (5.5.2) each has its number, and later kernels try that first. Nobody uses both.
        handlers = [self._inflate, self._deflate]
        if activation.has(uapi.VIRTIO_BALLOON_F_STATS_VQ):
            handlers.append(self._take_statistics)
        if activation.has(uapi.VIRTIO_BALLOON_F_REPORTING):
            handlers.append(self._take_report)
        self._handlers = {**dict(enumerate(handlers)), _REPORTING_VQ: self._take_report}

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
        self._stats_buffer = None
        self.actual = 0

    # Pages

    def _inflate(self, queue: Queue) -> None:
        for chain in queue.chains():
            pages = iter(self._pages_of(chain))
            # A driver may name as many as fit into its memory, several times over: so many at a time.
            while some := list(islice(pages, _BATCH)):
                self._discard(some)
            queue.push(chain, 0)

    def _deflate(self, queue: Queue) -> None:
        """The guest takes pages back: they are there as soon as it touches them."""
        for chain in queue.chains():
            queue.push(chain, 0)

    def _take_report(self, queue: Queue) -> None:
        """Free pages: the guest does not touch them until it has the buffer back."""
        for chain in queue.chains():
            self._discard((_address(view), len(view)) for view in chain.writable if len(view))
            queue.push(chain, 0)

    def _pages_of(self, chain: Chain) -> Iterable[tuple[int, int]]:
        """Where the pages that a chain names are in this process: address and size."""
        if chain.readable_bytes % _PFN.size or chain.writable or self._activation is None:
            raise DriverError(f"names pages in {chain.readable_bytes} bytes, which are not whole numbers")
        if chain.readable_bytes > _MOST_PAGES * _PFN.size:
            raise DriverError(f"names {chain.readable_bytes // _PFN.size} pages in one buffer")
        view = self._activation.dma.view
        for piece in chain.readable:
            if len(piece) % _PFN.size:
                raise DriverError("cuts the number of a page in two")
            for (number,) in _PFN.iter_unpack(piece):
                yield _address(view(number << uapi.VIRTIO_BALLOON_PFN_SHIFT, PAGE_SIZE)), PAGE_SIZE

    def _discard(self, ranges: Iterable[tuple[int, int]]) -> None:
        for address, size in _merged(ranges):
            try:
                self.discarded += self._memory.discard(address, size)
            except KernelError as error:
                # The guest does without the page all the same; that the host does not get it must be known.
                if not self._refused:
                    self._refused = True
                    self._say(f"balloon: {error}; what the guest gives up may stay in the host's RAM")

    # Statistics

    def _take_statistics(self, queue: Queue) -> None:
        """The driver's one buffer: it is kept, and giving it back asks for new figures."""
        for chain in queue.chains():
            if chain.writable:
                raise DriverError("gives a buffer of statistics to be written to")
            if self._stats_buffer is not None:
                queue.push(self._stats_buffer, 0)
            self._stats_buffer = chain
            raw = b"".join(part(chain.readable, 0, _MOST_STATS * _STAT_SIZE))
            whole = len(raw) // _STAT_SIZE * _STAT_SIZE
            found = dict(uapi.VIRTIO_BALLOON_STAT.iter_unpack(raw[:whole]))
            self.statistics = {name: found[tag] for tag, name in _STAT_NAMES.items() if tag in found}

    def ask_for_statistics(self) -> None:
        """Make the guest fill `statistics` anew. On the worker thread."""
        activation, chain = self._activation, self._stats_buffer
        if activation is not None and chain is not None and (queue := activation.queues[2]) is not None:
            self._stats_buffer = None
            queue.push(chain, 0)
            queue.notify()


def _address(view: memoryview) -> int:
    """Where it is in this process."""
    return addressof(c_char.from_buffer(view))


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same bytes in as few (address, size) as possible: one system call for each."""
    merged: list[tuple[int, int]] = []
    for address, size in sorted(ranges):
        if merged and address <= sum(merged[-1]):
            start, before = merged[-1]
            merged[-1] = start, max(before, address + size - start)
        else:
            merged.append((address, size))
    return merged
