"""virtio-net (virtio 1.2, section 5.1): one pair of queues, a control queue, offloads where the host's side has them.

A packet costs one system call, which moves it between the host's file and guest memory; the interpreter sees its
buffers, never its bytes. Packets are moved for as long as there are any (to a budget, so that neither direction starves
the other), and the driver is interrupted once for all of them.
"""

import errno
import select
import struct
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from ctypes import c_uint8, sizeof

from offmap.devices.virtio.device import Activation, VirtioDevice
from offmap.devices.virtio.dma import DriverError
from offmap.devices.virtio.iov import part, scatter
from offmap.devices.virtio.queue import Chain, Queue
from offmap.devices.virtio.vhost import VhostNet
from offmap.errors import KernelError
from offmap.typed import Protocol
from offmap.uapi import if_tun
from offmap.uapi.virtio import net as uapi
from offmap.uapi.virtio.config import VIRTIO_ID_NET

RX, TX, CTRL = range(3)

_HEADER_SIZE = sizeof(uapi.virtio_net_hdr_v1)
_NUM_BUFFERS_AT = uapi.virtio_net_hdr_v1.num_buffers.offset
_NUM_BUFFERS = struct.Struct("<H")
_IOV_MAX = 1024  # UIO_MAXIOV, linux/uio.h
_BUDGET = 64  # packets of one direction before the other one's turn: some milliseconds

_ETHERNET = 14 + 4  # header and VLAN tag
_MAX_PACKET = _HEADER_SIZE + _ETHERNET + 65535  # the largest IP packet; what GSO makes is no larger
_CONTROL_BYTES = 2 + 6  # the part of a command that is read: class, cmd, a MAC address

# What the host may leave undone in packets for the guest, by the feature that the guest accepted.
_GUEST_OFFLOADS = {
    uapi.VIRTIO_NET_F_GUEST_CSUM: if_tun.TUN_F_CSUM,
    uapi.VIRTIO_NET_F_GUEST_TSO4: if_tun.TUN_F_TSO4,
    uapi.VIRTIO_NET_F_GUEST_TSO6: if_tun.TUN_F_TSO6,
    uapi.VIRTIO_NET_F_GUEST_ECN: if_tun.TUN_F_TSO_ECN,
}
_HOST_OFFLOADS = (
    uapi.VIRTIO_NET_F_CSUM,
    uapi.VIRTIO_NET_F_HOST_TSO4,
    uapi.VIRTIO_NET_F_HOST_TSO6,
    uapi.VIRTIO_NET_F_HOST_ECN,
)
# What a feature needs: one of these (5.1.3.1). A tap refuses other combinations.
_NEEDS = {
    uapi.VIRTIO_NET_F_GUEST_TSO4: (uapi.VIRTIO_NET_F_GUEST_CSUM,),
    uapi.VIRTIO_NET_F_GUEST_TSO6: (uapi.VIRTIO_NET_F_GUEST_CSUM,),
    uapi.VIRTIO_NET_F_GUEST_ECN: (uapi.VIRTIO_NET_F_GUEST_TSO4, uapi.VIRTIO_NET_F_GUEST_TSO6),
    uapi.VIRTIO_NET_F_HOST_TSO4: (uapi.VIRTIO_NET_F_CSUM,),
    uapi.VIRTIO_NET_F_HOST_TSO6: (uapi.VIRTIO_NET_F_CSUM,),
    uapi.VIRTIO_NET_F_HOST_ECN: (uapi.VIRTIO_NET_F_HOST_TSO4, uapi.VIRTIO_NET_F_HOST_TSO6),
}
_BASE = (
    uapi.VIRTIO_NET_F_MAC,
    uapi.VIRTIO_NET_F_STATUS,
    uapi.VIRTIO_NET_F_MRG_RXBUF,
    uapi.VIRTIO_NET_F_CTRL_VQ,
    uapi.VIRTIO_NET_F_CTRL_RX,
    uapi.VIRTIO_NET_F_CTRL_RX_EXTRA,
    uapi.VIRTIO_NET_F_CTRL_MAC_ADDR,
)


class Backend(Protocol):
    """The host's side: a tap (tap.py), or passt (passt.py).

    Attributes:
        fd: readable and writable as `receive` and `send` say.
        changes: another fd, readable when `is_up` may have changed; or None.
        has_vnet_hdr: whether packets carry a virtio-net header, which offloads need.
        kind: "tap" or "passt".
    """

    fd: int
    has_vnet_hdr: bool
    kind: str

    @property
    def changes(self) -> int | None: ...
    def set_offload(self, flags: int) -> None: ...
    def receive(self, buffers: Sequence[memoryview]) -> int: ...
    def send(self, buffers: Sequence[memoryview]) -> None: ...
    def flush(self) -> bool: ...
    def forget(self) -> None: ...
    def is_up(self) -> bool: ...
    def last_words(self) -> str: ...
    def close(self) -> None: ...


class Net(VirtioDevice):
    """A network card.

    Args:
        backend: the host's side. The device owns it from here.
        mac: 6 bytes.
        mtu: to tell the guest, or None.
        say: takes a line for the user.
        vhost: moves the packets in the host kernel. The device owns it from here. The backend must be a tap.
    """

    device_id = VIRTIO_ID_NET
    queue_sizes = (256, 256, 64)

    def __init__(
        self, backend: Backend, mac: bytes, mtu: int | None, say: Callable[[str], None], vhost: VhostNet | None = None
    ) -> None:
        self._vhost = vhost
        self.kinds = (backend.kind,) if vhost is None else (backend.kind, "vhost")
        self._refused = False  # by vhost
        self._bypassed = False  # the packets are moved by the host kernel
        self._backend = backend
        self._mac = mac
        self._mtu = mtu
        self._say = say
        self._up = backend.is_up()
        self._gone = False
        offered = list(_BASE)
        if mtu is not None:
            offered.append(uapi.VIRTIO_NET_F_MTU)
        if backend.has_vnet_hdr:
            offered += [*_HOST_OFFLOADS, *_GUEST_OFFLOADS]
        self.features = sum(1 << bit for bit in offered)
        self._activation: Activation | None = None
        self._posted: deque[Chain] = deque()  # receive buffers, taken from the queue and not yet used
        self._room = 0  # bytes in them
        # Their pieces, and a byte of ours at the end: a packet that reaches it did not fit.
        self._pieces = [memoryview(bytearray(1))]
        self._unsent: Chain | None = None  # a packet that the host would not take yet
        self._watched = 0
        self._goes_on = False  # _go_on was posted

    def config(self) -> bytes:
        """struct virtio_net_config."""
        status = uapi.VIRTIO_NET_S_LINK_UP if self._up else 0
        mac = (c_uint8 * uapi.ETH_ALEN)(*self._mac)
        return bytes(uapi.virtio_net_config(mac, status, 1, self._mtu or 0))

    def activate(self, activation: Activation) -> None:
        rx, tx = activation.queues[RX], activation.queues[TX]
        if rx is None or tx is None:
            raise DriverError("leaves out a receive or a transmit queue")
        for feature, needed in _NEEDS.items():
            if activation.has(feature) and not any(map(activation.has, needed)):
                raise DriverError(f"accepts the offload of feature {feature} without the one that it needs")
        self._rx, self._tx = rx, tx
        self._activation = activation
        self._mergeable = activation.has(uapi.VIRTIO_NET_F_MRG_RXBUF)
        if self._backend.has_vnet_hdr and not self._gone:
            offloads = sum(flag for feature, flag in _GUEST_OFFLOADS.items() if activation.has(feature))
            try:
                self._backend.set_offload(offloads)
            except KernelError as error:
                if error.errno != errno.EBADFD:
                    raise
                self._gone = True  # the tap was deleted before the driver came: a card without a link
        if (changes := self._backend.changes) is not None:
            activation.worker.watch(changes, self._changed)
        self._changed()
        self._start_vhost(activation, {RX: rx, TX: tx})

    def handle(self, queue: int) -> None:
        if self._activation is None:
            return
        if queue == CTRL:
            try:
                self._control()
            except DriverError:
                self._stop_vhost()
                raise
        elif self._bypassed:
            pass
        elif queue == RX:
            self._receive()
        else:
            self._transmit()

    def reset(self) -> None:
        if self._activation is not None:
            self._stop_vhost()
            self._watch(0)
            if (changes := self._backend.changes) is not None:
                self._activation.worker.unwatch(changes)
        self._activation = None
        self._posted.clear()
        self._room = 0
        del self._pieces[:-1]
        self._unsent = None
        self._backend.forget()

    def close(self) -> None:
        if self._vhost is not None:
            self._vhost.close()
        self._backend.close()

    # The host kernel moves the packets

    def _start_vhost(self, activation: Activation, queues: Mapping[int, Queue]) -> None:
        bypass = activation.bypass
        if self._vhost is None or bypass is None or self._gone:
            return
        try:
            self._vhost.start(self._backend.fd, list(queues.items()), activation.features, activation.dma, bypass)
        except KernelError as error:
            self._vhost.stop()
            if not self._refused:  # said once: the driver may reset its card often
                self._refused = True
                instead = "its packets go through this process instead"
                self._say(f"net: vhost-net does not take this guest: {error}; {instead}")
            return
        bypass.take(list(queues))
        activation.worker.watch(self._vhost.errors, self._vhost_failed)
        self._bypassed = True

    def pause(self) -> None:
        if self._vhost is not None and self._bypassed:
            self._vhost.pause()

    def resume(self) -> None:
        if self._vhost is not None and self._bypassed:
            self._vhost.resume()

    def _stop_vhost(self) -> None:
        if self._vhost is not None and self._activation is not None and self._bypassed:
            self._activation.worker.unwatch(self._vhost.errors)
            self._vhost.stop()
            self._bypassed = False

    def _vhost_failed(self, _events: int) -> None:
        self._stop_vhost()
        raise DriverError("breaks the rules of a queue that the host kernel serves")

    # The host's side

    def _watch(self, events: int) -> None:
        if events == self._watched or self._activation is None:
            return
        self._watched = events
        if events:
            self._activation.worker.watch(self._backend.fd, self._ready, events)
        else:
            self._activation.worker.unwatch(self._backend.fd)

    def _ready(self, events: int) -> None:
        if events & (select.EPOLLIN | select.EPOLLERR | select.EPOLLHUP):
            self._receive()
        # An interface that has gone polls as an error, never as writable. The next write reports it.
        if events & (select.EPOLLOUT | select.EPOLLERR | select.EPOLLHUP) and self._backend.flush():
            self._watch(self._watched & ~select.EPOLLOUT)
            self._transmit()

    def _changed(self, _events: int = 0) -> None:
        """Look whether the link is up. Tell the driver if that has changed."""
        up = not self._gone and self._backend.is_up()
        if up == self._up or self._activation is None:
            return
        self._up = up
        self._say(f"net: the link is {'up again' if up else f'down: {self._backend.last_words()}'}")
        self._activation.config_changed()

    def _failed(self, error: OSError) -> None:
        """A read or write has failed with another error than EAGAIN."""
        if error.errno in {errno.EBADFD, errno.ECONNRESET, errno.EPIPE}:
            self._gone = True
            self._watch(0)
        self._changed()

    # Packets

    def _receive(self) -> None:
        """Move packets to the guest."""
        receive, pieces = self._backend.receive, self._pieces
        try:
            for _ in range(_BUDGET):
                if self._gone:
                    return
                if self._room < _MAX_PACKET and not self._gather():
                    # Packets need not wake us while there are no buffers: the driver kicks when there are.
                    self._watch(self._watched & ~select.EPOLLIN)
                    return
                received = receive(pieces)
                if received <= self._room:
                    self._use(received)
                # else the packet did not fit into the driver's buffers, and is lost as on a real wire
        except BlockingIOError:
            pass
        except OSError as error:
            self._failed(error)
        finally:
            self._rx.notify()
        if not self._gone:
            self._watch(self._watched | select.EPOLLIN)

    def _gather(self) -> bool:
        """Take receive buffers until the largest packet fits. Return whether a packet may be received."""
        queue, posted, pieces = self._rx, self._posted, self._pieces
        if posted and not self._mergeable:
            return True
        while True:
            chain = queue.take()
            if chain is None:
                # If the whole queue holds less than the largest packet, smaller ones still arrive.
                return self._mergeable and len(posted) >= queue.size
            if chain.readable or chain.writable_bytes < _HEADER_SIZE:
                raise DriverError(f"gives a receive buffer of {chain.writable_bytes} bytes")
            posted.append(chain)
            self._room += chain.writable_bytes
            pieces[-1:-1] = chain.writable
            if len(pieces) > _IOV_MAX:
                raise DriverError(f"gives receive buffers for one packet in more than {_IOV_MAX} pieces")
            if self._room >= _MAX_PACKET or not self._mergeable:
                return True

    def _use(self, received: int) -> None:
        """Give back the buffers that a packet is in."""
        used = []
        while received > 0:
            chain = self._posted.popleft()
            size = chain.writable_bytes
            self._room -= size
            used.append((chain, min(received, size)))
            received -= size
            del self._pieces[: len(chain.writable)]
        first = used[0][0].writable
        if len(first[0]) >= _HEADER_SIZE:
            _NUM_BUFFERS.pack_into(first[0], _NUM_BUFFERS_AT, len(used))
        else:
            scatter(_NUM_BUFFERS.pack(len(used)), part(first, _NUM_BUFFERS_AT))
        self._rx.push_all(used)

    def _transmit(self) -> None:
        """Move packets from the guest."""
        queue, send = self._tx, self._backend.send
        try:
            for _ in range(_BUDGET):
                chain, self._unsent = self._unsent or queue.take(), None
                if chain is None:
                    return
                if chain.writable:
                    raise DriverError("gives a transmit buffer to be written to")
                try:
                    if self._up:
                        send(chain.readable)
                except BlockingIOError:
                    self._unsent = chain
                    self._watch(self._watched | select.EPOLLOUT)
                    return
                except OSError as error:
                    # EINVAL: it is no packet, or its header is wrong. It is lost, as on a real wire.
                    if error.errno != errno.EINVAL:
                        self._failed(error)
                queue.push(chain, 0)
            # The budget is used up: receive first.
            if self._activation is not None and not self._goes_on:
                self._goes_on = True  # once: each kick would post another one
                self._activation.worker.post(self._go_on)
        finally:
            queue.notify()
            if not self._gone and not self._backend.flush():
                self._watch(self._watched | select.EPOLLOUT)

    def _go_on(self) -> None:
        self._goes_on = False
        if self._activation is not None:
            self._transmit()

    # Commands

    def _control(self) -> None:
        queue = self._activation.queues[CTRL] if self._activation is not None else None
        if queue is None:
            return
        for chain in queue.chains():
            if chain.readable_bytes < 2 or not chain.writable_bytes:
                raise DriverError("gives a control command without a header, or without room for its answer")
            class_, command, *argument = b"".join(part(chain.readable, 0, _CONTROL_BYTES))
            done = self._obey(class_, command, bytes(argument))
            part(chain.writable, 0, 1)[0][0] = uapi.VIRTIO_NET_OK if done else uapi.VIRTIO_NET_ERR
            queue.push(chain, 1)
        queue.notify()

    def _obey(self, class_: int, command: int, argument: bytes) -> bool:
        match class_, command:
            case uapi.VIRTIO_NET_CTRL_RX, _:
                # "Filtering is best-effort" (5.1.6.5.1): the guest gets everything that comes.
                return command <= uapi.VIRTIO_NET_CTRL_RX_NOBCAST
            case uapi.VIRTIO_NET_CTRL_MAC, uapi.VIRTIO_NET_CTRL_MAC_TABLE_SET:
                return True
            case uapi.VIRTIO_NET_CTRL_MAC, uapi.VIRTIO_NET_CTRL_MAC_ADDR_SET if len(argument) == uapi.ETH_ALEN:
                self._mac = argument
                return True
            case _:
                return False
