"""virtio-vsock: configuration space and packet header (linux/virtio_vsock.h; virtio 1.2, 5.10)."""

import struct

from offmap.typed import NamedTuple

VIRTIO_VSOCK_TYPE_STREAM = 1

VIRTIO_VSOCK_OP_REQUEST = 1
VIRTIO_VSOCK_OP_RESPONSE = 2
VIRTIO_VSOCK_OP_RST = 3
VIRTIO_VSOCK_OP_SHUTDOWN = 4
VIRTIO_VSOCK_OP_RW = 5
VIRTIO_VSOCK_OP_CREDIT_UPDATE = 6
VIRTIO_VSOCK_OP_CREDIT_REQUEST = 7

VIRTIO_VSOCK_SHUTDOWN_RCV = 1
VIRTIO_VSOCK_SHUTDOWN_SEND = 2

VMADDR_CID_ANY = 0xFFFFFFFF  # linux/vm_sockets.h
VMADDR_CID_HOST = 2

VIRTIO_VSOCK_HDR = struct.Struct("<QQIIIHHIII")


class virtio_vsock_hdr(NamedTuple):
    """The fields of VIRTIO_VSOCK_HDR, before the bytes of every packet."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    len: int
    type: int
    op: int
    flags: int = 0
    buf_alloc: int = 0
    fwd_cnt: int = 0
