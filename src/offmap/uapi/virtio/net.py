"""virtio-net: features, configuration space, packet header, control commands (linux/virtio_net.h; virtio 1.2, 5.1)."""

from ctypes import LittleEndianStructure, c_uint8

from offmap.uapi.members import u8, u16

VIRTIO_NET_F_CSUM = 0
VIRTIO_NET_F_GUEST_CSUM = 1
VIRTIO_NET_F_MTU = 3
VIRTIO_NET_F_MAC = 5
VIRTIO_NET_F_GUEST_TSO4 = 7
VIRTIO_NET_F_GUEST_TSO6 = 8
VIRTIO_NET_F_GUEST_ECN = 9
VIRTIO_NET_F_HOST_TSO4 = 11
VIRTIO_NET_F_HOST_TSO6 = 12
VIRTIO_NET_F_HOST_ECN = 13
VIRTIO_NET_F_HOST_UFO = 14
VIRTIO_NET_F_MRG_RXBUF = 15
VIRTIO_NET_F_STATUS = 16
VIRTIO_NET_F_CTRL_VQ = 17
VIRTIO_NET_F_CTRL_RX = 18
VIRTIO_NET_F_CTRL_RX_EXTRA = 20
VIRTIO_NET_F_CTRL_MAC_ADDR = 23

VIRTIO_NET_S_LINK_UP = 1


VIRTIO_NET_OK = 0
VIRTIO_NET_ERR = 1

VIRTIO_NET_CTRL_RX = 0
VIRTIO_NET_CTRL_RX_PROMISC = 0
VIRTIO_NET_CTRL_RX_NOBCAST = 5

VIRTIO_NET_CTRL_MAC = 1
VIRTIO_NET_CTRL_MAC_TABLE_SET = 0
VIRTIO_NET_CTRL_MAC_ADDR_SET = 1

ETH_ALEN = 6  # linux/if_ether.h


class virtio_net_config(LittleEndianStructure):
    """Up to ``mtu``: what follows belongs to features that are not offered."""

    _pack_ = 1
    _fields_ = [("mac", c_uint8 * ETH_ALEN), *u16("status max_virtqueue_pairs mtu")]


class virtio_net_hdr_v1(LittleEndianStructure):
    """Before every packet, in both directions."""

    _fields_ = [*u8("flags gso_type"), *u16("hdr_len gso_size csum_start csum_offset num_buffers")]
