"""virtio-blk: a drive (virtio 1.2, section 5.2).

One request of a usual size is one system call, done on the device's thread: a disk that takes its time holds up its own
drive and nothing else. What the driver gets wrong in the ring is its own fault (NEEDS_RESET); what a request asks for
and cannot have is a status of that request.
"""

import errno
import os
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from offmap.devices.virtio.device import Activation, VirtioDevice
from offmap.devices.virtio.disk import SECTOR, Disk
from offmap.devices.virtio.dma import DriverError
from offmap.devices.virtio.iov import length, part, scatter
from offmap.devices.virtio.queue import Chain, Queue
from offmap.typed import ClassVar, NamedTuple
from offmap.uapi.virtio import blk as uapi
from offmap.uapi.virtio.config import VIRTIO_ID_BLOCK

QUEUE_SIZE = 512
"""A request of 1 MiB in scattered pages is one chain: 256 descriptors of data, one header, one status."""

_MAX_RANGES = {uapi.VIRTIO_BLK_T_DISCARD: 64, uapi.VIRTIO_BLK_T_WRITE_ZEROES: 1}  # of one request
_MAX_RANGE_SECTORS = 1 << 22  # 2 GiB in one range
_MOST_PIECES = 16  # of ranges that are discarded or zeroed before others have their turn
_MOST_MOVED = 16 << 20  # bytes of data, likewise: a request may have 4 GiB, and a disk be slow
_BATCH = 16  # requests that are answered before the driver is told of the first
_HEADER_SIZE = uapi.VIRTIO_BLK_OUTHDR.size


class Blk(VirtioDevice):
    """The device.

    Args:
        disk: what is behind it; the device owns it.
        serial: at most 20 bytes.
        say: takes a line for the user.
    """

    kinds = ("drive",)
    device_id: ClassVar[int] = VIRTIO_ID_BLOCK
    queue_sizes = (QUEUE_SIZE,)

    def __init__(
        self, disk: Disk, *, readonly: bool = False, serial: str = "", say: Callable[[str], None] = lambda _: None
    ) -> None:
        self._disk = disk
        self.files = (disk.fd,)
        self._readonly = readonly
        self._id = serial.encode()[: uapi.VIRTIO_BLK_ID_BYTES].ljust(uapi.VIRTIO_BLK_ID_BYTES, b"\0")
        self._say = say
        self._said: set[tuple[str, int]] = set()
        self._sectors = disk.size // SECTOR
        self._queue: Queue | None = None
        self._sync = False
        self._unfinished: _Ranges | None = None
        offered = [
            uapi.VIRTIO_BLK_F_SEG_MAX,
            uapi.VIRTIO_BLK_F_BLK_SIZE,
            uapi.VIRTIO_BLK_F_TOPOLOGY,
            uapi.VIRTIO_BLK_F_FLUSH,
        ]
        offered += [uapi.VIRTIO_BLK_F_RO] if readonly else [uapi.VIRTIO_BLK_F_DISCARD, uapi.VIRTIO_BLK_F_WRITE_ZEROES]
        self.features = sum(1 << bit for bit in offered)
        self._others: dict[int, Callable[[list[memoryview], list[memoryview]], int]] = {
            uapi.VIRTIO_BLK_T_FLUSH: self._flush,
            uapi.VIRTIO_BLK_T_GET_ID: self._get_id,
            **{kind: partial(self._check, kind) for kind in _MAX_RANGES},
        }

    def config(self) -> bytes:
        logical, physical = self._disk.logical_block_size, self._disk.physical_block_size
        blocks = max(physical // logical, 1)
        return bytes(
            uapi.virtio_blk_config(
                capacity=self._sectors,
                seg_max=QUEUE_SIZE - 2,
                blk_size=logical,
                physical_block_exp=blocks.bit_length() - 1,
                min_io_size=blocks,
                opt_io_size=0,
                num_queues=1,
                max_discard_sectors=_MAX_RANGE_SECTORS,
                max_discard_seg=_MAX_RANGES[uapi.VIRTIO_BLK_T_DISCARD],
                discard_sector_alignment=max(physical, logical) // SECTOR,
                max_write_zeroes_sectors=_MAX_RANGE_SECTORS,
                max_write_zeroes_seg=_MAX_RANGES[uapi.VIRTIO_BLK_T_WRITE_ZEROES],
                write_zeroes_may_unmap=1,
            )
        )

    def activate(self, activation: Activation) -> None:
        self._queue = activation.queues[0]
        # If the driver does not use flushes, data must be on the disk when a write is done (5.2.5).
        self._sync = not activation.has(uapi.VIRTIO_BLK_F_FLUSH)

    def reset(self) -> None:
        self._queue = self._unfinished = None

    def close(self) -> None:
        self._disk.close()

    def handle(self, queue: int) -> None:
        requests = self._queue
        if requests is None or not self._go_on(requests):
            return
        answered = 0
        for chain in requests.chains():
            written = self._serve(chain)
            if self._unfinished is not None and not self._go_on(requests):
                return
            if written:
                requests.push(chain, written)
            answered += 1
            if answered == _BATCH:
                answered = 0
                requests.notify()
        requests.notify()

    def _serve(self, chain: Chain) -> int:
        """Answer one request.

        Returns:
            How many bytes of it were written: the data's and the status's, which comes last. 0: it is not finished.

        Raises:
            DriverError: it has no header or no room for a status.
        """
        readable, writable = chain.readable, chain.writable
        if not writable or chain.readable_bytes < _HEADER_SIZE:
            raise DriverError("makes a block request without a header or without room for a status")
        # Drivers put header, data and status into descriptors of their own; none has to (2.7.4).
        status = writable.pop()
        if len(status) != 1:
            if not status:
                raise DriverError("makes a block request whose status has no room")
            writable.append(status[:-1])
            status = status[-1:]
        header = readable.pop(0)
        if len(header) == _HEADER_SIZE:
            kind, _, sector = uapi.VIRTIO_BLK_OUTHDR.unpack_from(header)
        else:
            kind, sector = _split_header(header, readable)
        try:
            if kind == uapi.VIRTIO_BLK_T_IN:
                size = chain.writable_bytes - 1
                if size & 511 or sector + (size >> 9) > self._sectors:
                    status[0] = uapi.VIRTIO_BLK_S_IOERR
                elif size > _MOST_MOVED:
                    self._unfinished = _moves(chain, status, kind, writable, size, sector)
                    return 0
                else:
                    self._disk.read(writable, size, sector << 9)
                    status[0] = uapi.VIRTIO_BLK_S_OK
                return size + 1
            if kind == uapi.VIRTIO_BLK_T_OUT:
                size = chain.readable_bytes - _HEADER_SIZE
                if size & 511 or sector + (size >> 9) > self._sectors or self._readonly:
                    status[0] = uapi.VIRTIO_BLK_S_IOERR
                elif size > _MOST_MOVED:
                    self._unfinished = _moves(chain, status, kind, readable, size, sector)
                    return 0
                else:
                    self._disk.write(readable, size, sector << 9, sync=self._sync)
                    status[0] = uapi.VIRTIO_BLK_S_OK
                return 1
            other = self._others.get(kind)
            status[0] = uapi.VIRTIO_BLK_S_UNSUPP if other is None else other(readable, writable)
            if kind in _MAX_RANGES and status[0] == uapi.VIRTIO_BLK_S_OK:
                self._unfinished = _Ranges(chain, status, kind, deque(_ranges(readable)))
                return 0
        except OSError as error:
            status[0] = self._failed(kind, error)
        return chain.writable_bytes

    def _failed(self, kind: int, error: OSError) -> int:
        """Return the status for an error of the host. Tell the user once for each kind of request and error."""
        number = error.errno or errno.EIO
        if kind in (uapi.VIRTIO_BLK_T_DISCARD, uapi.VIRTIO_BLK_T_WRITE_ZEROES) and number in (
            errno.EOPNOTSUPP,
            errno.ENOTTY,
        ):
            return uapi.VIRTIO_BLK_S_UNSUPP
        operation = {
            uapi.VIRTIO_BLK_T_IN: "read",
            uapi.VIRTIO_BLK_T_OUT: "written",
            uapi.VIRTIO_BLK_T_FLUSH: "flushed",
            uapi.VIRTIO_BLK_T_DISCARD: "discarded",
        }.get(kind, "zeroed")
        if (operation, number) not in self._said:
            self._said.add((operation, number))
            reason = error.strerror or os.strerror(number)
            self._say(f"the drive {self._disk.path} cannot be {operation}: {reason}; the guest gets an I/O error")
        return uapi.VIRTIO_BLK_S_IOERR

    def _flush(self, readable: list[memoryview], writable: list[memoryview]) -> int:
        if self._queue is not None:
            self._queue.notify()  # this request may take long, and others are done
        self._disk.flush()
        return uapi.VIRTIO_BLK_S_OK

    def _get_id(self, readable: list[memoryview], writable: list[memoryview]) -> int:
        return uapi.VIRTIO_BLK_S_OK if scatter(self._id, writable) == len(self._id) else uapi.VIRTIO_BLK_S_IOERR

    def _check(self, kind: int, readable: list[memoryview], _writable: list[memoryview]) -> int:
        """Return the status of a discard or write-zeroes request that is refused, or OK if it is to be done."""
        size, of_one = length(readable), uapi.VIRTIO_BLK_DISCARD_WRITE_ZEROES.size
        if not size or size % of_one or size > of_one * _MAX_RANGES[kind] or self._readonly:
            return uapi.VIRTIO_BLK_S_IOERR
        allowed = uapi.VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP if kind == uapi.VIRTIO_BLK_T_WRITE_ZEROES else 0
        for sector, count, flags in _ranges(readable):
            if flags & ~allowed:
                return uapi.VIRTIO_BLK_S_UNSUPP
            if count > _MAX_RANGE_SECTORS or sector + count > self._sectors:
                return uapi.VIRTIO_BLK_S_IOERR
        return uapi.VIRTIO_BLK_S_OK

    def _go_on(self, requests: Queue) -> bool:
        """Do a part of an unfinished request. Return whether the next request may be started.

        The host may have to write the zeroes, or to read much from a slow disk. So others have their turn after each
        such piece: whoever stops or resets the device need not wait for the whole request.
        """
        pieces = 0
        while (work := self._unfinished) is not None:
            status = uapi.VIRTIO_BLK_S_OK
            try:
                while work.ranges:
                    if pieces >= _MOST_PIECES and requests.go_on_later():
                        return False
                    pieces += 1 if self._do_piece(requests, work) else _MOST_PIECES
            except OSError as error:
                status = self._failed(work.kind, error)
            self._unfinished = None
            work.status[0] = status
            requests.push(work.chain, work.chain.writable_bytes)
            requests.notify()
        return pieces < _MOST_PIECES or not requests.go_on_later()

    def _do_piece(self, requests: Queue, work: "_Ranges") -> bool:
        """Discard, zero or move a part of the first range. Return whether that was quick: no data was moved."""
        sector, count, flags = work.ranges.popleft()
        if work.kind in (uapi.VIRTIO_BLK_T_IN, uapi.VIRTIO_BLK_T_OUT):
            views = part(work.views, sector - work.first << 9, count << 9)
            if work.kind == uapi.VIRTIO_BLK_T_IN:
                self._disk.read(views, count << 9, sector << 9)
            else:
                self._disk.write(views, count << 9, sector << 9, sync=self._sync)
            return False
        quick = True
        if work.kind == uapi.VIRTIO_BLK_T_DISCARD:
            done = self._disk.discard(sector << 9, count << 9)
        else:
            done, quick = self._disk.write_zeroes(sector << 9, count << 9, unmap=bool(flags))
            if not quick:
                requests.charge(done)
        if done < count << 9:
            work.ranges.appendleft((sector + (done >> 9), count - (done >> 9), flags))
        return quick


class _Ranges(NamedTuple):
    """A request that is done in parts, and the parts that are left: sectors, their numbers, flags.

    For one that reads or writes, `views` is its data, which begins at the sector `first`.
    """

    chain: Chain
    status: memoryview
    kind: int
    ranges: deque[tuple[int, int, int]]
    views: Sequence[memoryview] = ()
    first: int = 0


def _moves(chain: Chain, status: memoryview, kind: int, views: Sequence[memoryview], size: int, sector: int) -> _Ranges:
    """A request that reads or writes much: a piece at a time."""
    end, step = sector + (size >> 9), _MOST_MOVED >> 9
    ranges = deque((at, min(step, end - at), 0) for at in range(sector, end, step))
    return _Ranges(chain, status, kind, ranges, views, sector)


def _ranges(readable: list[memoryview]) -> list[tuple[int, int, int]]:
    """The ranges of a request that are not empty: first sector, number of sectors, flags."""
    return [r for r in uapi.VIRTIO_BLK_DISCARD_WRITE_ZEROES.iter_unpack(b"".join(readable)) if r[1] or r[2]]


def _split_header(first: memoryview, readable: list[memoryview]) -> tuple[int, int]:
    """Take a header that spans descriptors, or has data behind it, off `readable`. Return its type and sector."""
    header = bytes(first[:_HEADER_SIZE])
    rest = first[_HEADER_SIZE:]
    while len(header) < _HEADER_SIZE:
        view = readable.pop(0)
        missing = _HEADER_SIZE - len(header)
        header += bytes(view[:missing])
        rest = view[missing:]
    if rest:
        readable.insert(0, rest)
    kind, _, sector = uapi.VIRTIO_BLK_OUTHDR.unpack(header)
    return kind, sector
