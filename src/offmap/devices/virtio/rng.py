"""virtio-rng: entropy, which the kernel writes straight into the guest's memory (virtio 1.2, section 5.4)."""

import errno
import os

from offmap.devices.virtio.device import Activation, Surroundings, VirtioDevice
from offmap.devices.virtio.dma import DriverError
from offmap.devices.virtio.iov import part
from offmap.devices.virtio.limit import USAGE, Limit
from offmap.devices.virtio.queue import Queue
from offmap.errors import KernelError
from offmap.options import Options
from offmap.typed import ClassVar, NamedTuple
from offmap.uapi.virtio.config import VIRTIO_ID_RNG

_SOURCE = "/dev/urandom"
_MOST = 1 << 16  # bytes in one answer: a driver that asks for a gigabyte must not keep a processor busy for seconds


class RngSpec(NamedTuple):
    """``--rng[=rate=BYTES,ops=N]``.

    Attributes:
        limit: how much entropy the guest may have in a second.
    """

    limit: Limit | None = None

    def build(self, surroundings: Surroundings) -> "Rng":
        """Open the host's source."""
        try:
            fd = os.open(_SOURCE, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise KernelError(f"open of {_SOURCE}", error) from None
        rng = Rng(fd)
        rng.limit = self.limit
        return rng


class Rng(VirtioDevice):
    """The device.

    Args:
        fd: of /dev/urandom, which the device then owns.
    """

    kinds = ("rng",)
    device_id: ClassVar[int] = VIRTIO_ID_RNG
    queue_sizes = (64,)

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._queue: Queue | None = None

    def activate(self, activation: Activation) -> None:
        self._queue = activation.queues[0]

    def handle(self, queue: int) -> None:
        requests = self._queue
        if requests is None:
            return
        for chain in requests.chains():
            if not chain.writable_bytes:
                raise DriverError("asks for no entropy: its buffer has nothing to write to")
            requests.push(chain, self._fill(chain.writable))
        requests.notify()

    def _fill(self, views: list[memoryview]) -> int:
        """Bytes written, at least 1 (5.4.6.2)."""
        try:
            # The source may give fewer bytes, and so may the device.
            return os.readv(self._fd, part(views, 0, _MOST))
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
        view = next(view for view in views if len(view))
        data = os.urandom(min(len(view), _MOST))
        view[: len(data)] = data
        return len(data)

    def reset(self) -> None:
        self._queue = None

    def close(self) -> None:
        os.close(self._fd)


def parse_rng(text: str) -> RngSpec:
    """``rate=BYTES``, ``ops=N``, or nothing. Raises OffmapError: what cannot be."""
    if not text:
        return RngSpec()
    with Options(text, "--rng", f"write --rng alone, or with {USAGE} (both a second)") as options:
        return RngSpec(Limit.from_options(options))
