"""virtio-net: features, configuration space, packet header, control commands (linux/virtio_net.h; virtio 1.2, 5.1)."""

from ctypes import LittleEndianStructure, c_uint8, c_uint16

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
    _fields_ = [
        ("mac", c_uint8 * ETH_ALEN),
        ("status", c_uint16),
        ("max_virtqueue_pairs", c_uint16),
        ("mtu", c_uint16),
    ]


class virtio_net_hdr_v1(LittleEndianStructure):
    """Before every packet, in both directions."""

    _fields_ = [
        ("flags", c_uint8),
        ("gso_type", c_uint8),
        ("hdr_len", c_uint16),
        ("gso_size", c_uint16),
        ("csum_start", c_uint16),
        ("csum_offset", c_uint16),
        ("num_buffers", c_uint16),
    ]
