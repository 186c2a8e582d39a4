"""virtio-console (virtio 1.2, 5.3): consoles (hvc0) and named ports, each between the guest and two files of the host.

A port is a byte stream each way: what its input file has goes to the guest, what the guest writes goes to its output
file, by readv and writev straight from and to guest memory. A reader that is slow stops the guest's writer, and no
other port. In the guest a named port is /dev/virtio-ports/NAME (udev) or the /dev/vportNpM whose
/sys/class/virtio-ports/vportNpM/name it is.
"""

import os
import select
import socket
from collections import deque
from collections.abc import Callable, Sequence

from offmap.devices.virtio.console_port import IOV_MAX, Port, Stream, read_into, write_from
from offmap.devices.virtio.device import Activation, Surroundings, VirtioDevice
from offmap.devices.virtio.dma import DriverError
from offmap.devices.virtio.iov import length, part, scatter
from offmap.devices.virtio.queue import Chain, Queue
from offmap.devices.virtio.worker import Worker
from offmap.typed import NamedTuple
from offmap.uapi.virtio import console as uapi
from offmap.uapi.virtio.config import VIRTIO_ID_CONSOLE

_CONTROL_TO_DRIVER, _CONTROL_FROM_DRIVER = 2, 3
_DATA_QUEUE_SIZE = 16  # Linux fills an input queue with pages: of 256, they would be 1 MiB of the guest's RAM
_CONTROL_QUEUE_SIZE = 32
_MOST_MESSAGES = 1024  # to the driver that it has not taken; an honest one leaves a few for each port
_BUDGET = 64  # buffers of one port and direction before others have their turn
_MOST_MOVED = 1 << 20  # bytes at once
_TERMINAL_ROOM = 128  # a pty counts its room in 256 bytes (TTYB_ALIGN_MASK, tty_buffer.c), and a newline takes two


class ConsoleSpec(NamedTuple):
    """A console device and its ports. A driver that knows no multiple ports gets the first."""

    ports: Sequence[Port]

    def build(self, _surroundings: Surroundings) -> "Console":
        """Make the device."""
        return Console(self.ports)


class Console(VirtioDevice):
    """The device. It has one rx and one tx queue for each port, and two for messages about them.

    Args:
        ports: the first is the console of a driver without multiple ports.
    """

    kinds = ("console",)
    device_id = VIRTIO_ID_CONSOLE
    features = 1 << uapi.VIRTIO_CONSOLE_F_SIZE | 1 << uapi.VIRTIO_CONSOLE_F_MULTIPORT

    def __init__(self, ports: Sequence[Port]) -> None:
        self._streams = [Stream(port, number) for number, port in enumerate(ports)]
        data, control = (_DATA_QUEUE_SIZE,) * 2, (_CONTROL_QUEUE_SIZE,) * 2
        self.queue_sizes = (*data, *control, *(data * (len(ports) - 1)))
        self._size = (0, 0)
        self._messages: deque[bytes] = deque()
        self._control_queue: Queue | None = None  # to the driver
        self._queues: Sequence[Queue | None] = ()
        self._worker: Worker | None = None
        self._config_changed: Callable[[], None] = lambda: None
        self._multiport = False

    def config(self) -> bytes:
        return uapi.VIRTIO_CONSOLE_CONFIG.pack(*self._size, len(self._streams), 0)

    def resize(self, cols: int, rows: int) -> None:
        """Tell the driver the size of the consoles' terminal. Any thread may call it."""
        self._size = (cols & 0xFFFF, rows & 0xFFFF)
        worker = self._worker
        if worker is not None:
            worker.post(self._tell_size)

    def _tell_size(self) -> None:
        if self._worker is None:
            return
        if self._multiport:
            for stream in self._streams:
                if stream.port.console and stream.open:
                    self._send_size(stream)
        else:
            self._config_changed()

    def activate(self, activation: Activation) -> None:
        self._worker = activation.worker
        self._config_changed = activation.config_changed
        self._queues = activation.queues
        self._multiport = activation.has(uapi.VIRTIO_CONSOLE_F_MULTIPORT)
        for stream in self._streams if self._multiport else self._streams[:1]:
            first = 2 * stream.number + (2 if stream.number else 0)
            stream.input_queue, stream.output_queue = self._queues[first], self._queues[first + 1]
        if self._multiport:
            self._control_queue = self._queues[_CONTROL_TO_DRIVER]
        elif self._streams:
            self._streams[0].open = True
            self._streams[0].use(True)

    def failed(self) -> None:
        for stream in self._streams:
            stream.use(False)

    def reset(self) -> None:
        for stream in self._streams:
            if self._worker is not None:
                for fd in (stream.port.input, stream.port.output):
                    if fd is not None:
                        self._worker.unwatch(fd)
            stream.forget()
        self._messages.clear()
        self._control_queue = None
        self._queues = ()
        self._multiport = False
        self._worker = None

    def close(self) -> None:
        for stream in self._streams:
            stream.close()

    def handle(self, queue: int) -> None:
        if self._multiport and queue == _CONTROL_FROM_DRIVER:
            self._take_messages()
        elif self._multiport and queue == _CONTROL_TO_DRIVER:
            self._send_messages()
        else:
            number = queue // 2 - 1 if queue > _CONTROL_FROM_DRIVER else 0
            if queue % 2:
                self._transmit(self._streams[number])
            else:
                self._receive(self._streams[number])

    # Messages about ports (5.3.6.2)

    def _take_messages(self) -> None:
        queue = self._queues[_CONTROL_FROM_DRIVER]
        if queue is None:
            return
        for chain in queue.chains():
            data = b"".join(part(chain.readable, 0, uapi.VIRTIO_CONSOLE_CONTROL.size))
            queue.push(chain, 0)
            if len(data) < uapi.VIRTIO_CONSOLE_CONTROL.size:
                raise DriverError(f"sends a control message of {len(data)} bytes")
            self._take_message(*uapi.VIRTIO_CONSOLE_CONTROL.unpack(data))
        queue.notify()

    def _take_message(self, number: int, event: int, value: int) -> None:
        if event == uapi.VIRTIO_CONSOLE_DEVICE_READY:
            for stream in self._streams if value else ():
                self._send(stream, uapi.VIRTIO_CONSOLE_PORT_ADD)
            return
        if number >= len(self._streams):
            raise DriverError(f"speaks of port {number} of {len(self._streams)}")
        stream = self._streams[number]
        if event == uapi.VIRTIO_CONSOLE_PORT_READY and value:
            if stream.port.console:
                self._send(stream, uapi.VIRTIO_CONSOLE_CONSOLE_PORT, 1)
                self._send_size(stream)
            # Open before it can be found by its name: who reads from a port that we have not opened reads its end.
            self._send(stream, uapi.VIRTIO_CONSOLE_PORT_OPEN, 1)
            if stream.port.name:
                self._send(stream, uapi.VIRTIO_CONSOLE_PORT_NAME, 1, stream.port.name.encode())
        elif event == uapi.VIRTIO_CONSOLE_PORT_OPEN:
            stream.open = bool(value)
            stream.use(stream.open)
            if stream.open and stream.port.console:
                self._send_size(stream)
            self._receive(stream)

    def _send_size(self, stream: Stream) -> None:
        if self._size != (0, 0):
            # The last one counts. A window that is dragged about must not fill the queue of a guest that is busy.
            head = uapi.VIRTIO_CONSOLE_CONTROL.pack(stream.number, uapi.VIRTIO_CONSOLE_RESIZE, 0)
            self._messages = deque(message for message in self._messages if not message.startswith(head))
            self._send(stream, uapi.VIRTIO_CONSOLE_RESIZE, 0, uapi.VIRTIO_CONSOLE_RESIZE_FORMAT.pack(*self._size))

    def _send(self, stream: Stream, event: int, value: int = 1, more: bytes = b"") -> None:
        if len(self._messages) >= _MOST_MESSAGES:
            raise DriverError(f"leaves {_MOST_MESSAGES} control messages unread")
        self._messages.append(uapi.VIRTIO_CONSOLE_CONTROL.pack(stream.number, event, value) + more)
        self._send_messages()

    def _send_messages(self) -> None:
        queue = self._control_queue
        if queue is None:
            return
        while self._messages and (chain := queue.take()) is not None:
            message = self._messages.popleft()
            if chain.writable_bytes < len(message):
                raise DriverError(f"gives {chain.writable_bytes} bytes for a control message of {len(message)}")
            queue.push(chain, scatter(message, chain.writable))
        queue.notify()

    # To the guest

    def _receive(self, stream: Stream) -> None:
        """Pass input on: at once from a regular file, else when poll says that there is some."""
        fd, queue, worker = stream.port.input, stream.input_queue, self._worker
        if fd is None or queue is None or worker is None:
            return
        if not stream.open or stream.input_ended:
            worker.unwatch(fd)
            return
        if stream.input_polls:
            if self._has_room(queue):
                worker.watch(fd, lambda _: self._input_ready(stream))
            else:
                worker.unwatch(fd)
            return
        for _ in range(_BUDGET):
            if stream.input_ended or not self._has_room(queue):
                break
            self._read_once(stream, fd, queue)
        else:
            queue.go_on_later()
        queue.notify()

    def _input_ready(self, stream: Stream) -> None:
        if stream.port.input is not None and stream.input_queue is not None:
            if self._has_room(stream.input_queue):
                self._read_once(stream, stream.port.input, stream.input_queue)
                stream.input_queue.notify()
            self._receive(stream)

    @staticmethod
    def _has_room(queue: Queue) -> bool:
        if queue.take() is None:
            return False
        queue.undo_pop()
        return True

    def _read_once(self, stream: Stream, fd: int, queue: Queue) -> None:
        chain = queue.pop()
        if chain is None:
            return
        if not chain.writable_bytes:
            raise DriverError("gives an empty buffer for input")
        try:
            size = read_into(fd, part(chain.writable, 0, _MOST_MOVED))
        except BlockingIOError:
            queue.undo_pop()
            return
        except OSError:
            size = 0  # a terminal that has hung up: no more input
        if size:
            queue.push(chain, size)
            return
        queue.undo_pop()
        stream.input_ended = True
        queue.notify()  # what came before, before its end
        if self._multiport:
            self._send(stream, uapi.VIRTIO_CONSOLE_PORT_OPEN, 0)

    # From the guest

    def _transmit(self, stream: Stream) -> None:
        if stream.port.last:
            for other in self._streams:
                if other is not stream and not other.port.last:
                    self._write_all(other)
                    if other.unwritten is not None or other.goes_on:
                        return  # whoever writes the rest of it comes back here
        self._write_all(stream)

    def _write_all(self, stream: Stream) -> None:
        """Write the guest's output until its reader is too slow, or others have their turn."""
        queue, worker = stream.output_queue, self._worker
        if queue is None or worker is None:
            return
        for _ in range(_BUDGET):
            chain, start = stream.unwritten or (queue.take(), 0)
            if chain is None:
                break
            if stream.unwritten is None:  # or the rest of what it wrote before it closed the port
                stream.use(True)
            size = self._write(stream, chain, start)
            if start + size < chain.readable_bytes:
                stream.unwritten = (chain, start + size)
                if not size:
                    break
                continue
            stream.unwritten = None
            queue.push(chain, 0)
        else:
            if not stream.goes_on:
                stream.goes_on = True  # once: each kick would post another one
                worker.post(lambda: self._go_on(stream))
        queue.notify()

    def _go_on(self, stream: Stream) -> None:
        stream.goes_on = False
        self._write_all(stream)
        if stream.unwritten is None and not stream.goes_on:
            for other in self._streams:
                if other.port.last:
                    self._transmit(other)

    def _write(self, stream: Stream, chain: Chain, start: int) -> int:
        """Write a part of a chain. Return how many bytes are done; 0 if they wait for poll to find room."""
        fd = stream.port.output
        buffers = part(chain.readable, start, _MOST_MOVED)[:IOV_MAX]
        if fd is None or stream.output_failed or not buffers:
            return chain.readable_bytes - start
        try:
            if stream.peer is not None:
                return stream.peer.send(buffers[0], socket.MSG_DONTWAIT)
            if stream.output_blocks:
                # poll(2) promises room for so much.
                poll = select.poll()
                poll.register(fd, select.POLLOUT)
                if not poll.poll(0):
                    raise BlockingIOError
                buffers = part(buffers, 0, min(length(buffers), _TERMINAL_ROOM if os.isatty(fd) else select.PIPE_BUF))
            return write_from(fd, buffers)
        except BlockingIOError:
            if self._worker is not None:
                self._worker.watch(fd, lambda _: self._output_ready(stream), select.EPOLLOUT)
            return 0
        except OSError as error:
            stream.output_failed = True
            stream.port.on_error(error)
            return chain.readable_bytes - start

    def _output_ready(self, stream: Stream) -> None:
        if self._worker is not None and stream.port.output is not None:
            self._worker.unwatch(stream.port.output)
        self._go_on(stream)
