"""tap devices: linux/if_tun.h, and what linux/if.h and linux/sockios.h say about any network interface."""

from ctypes import Structure, Union, c_char, c_int, c_short, c_uint, c_uint8

from offmap.uapi.ioctl import io, ior, iow

IFNAMSIZ = 16

IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000
IFF_MULTI_QUEUE = 0x0100

IFF_UP = 0x1

TUN_F_CSUM = 0x01
TUN_F_TSO4 = 0x02
TUN_F_TSO6 = 0x04
TUN_F_TSO_ECN = 0x08

SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
SIOCSIFADDR = 0x8916
SIOCSIFNETMASK = 0x891C
SIOCSIFMTU = 0x8922


class _ifr_ifru(Union):
    """As much of the union as is used, padded to its whole size (struct ifmap's, 24 bytes)."""

    _fields_ = [
        ("ifru_addr", c_uint8 * 16),  # struct sockaddr
        ("ifru_flags", c_short),
        ("ifru_mtu", c_int),
        ("padding", c_uint8 * 24),
    ]


class ifreq(Structure):
    """Names an interface for an ioctl, and carries its argument."""

    _anonymous_ = ("ifr_ifru",)
    _fields_ = [("ifr_name", c_char * IFNAMSIZ), ("ifr_ifru", _ifr_ifru)]


TUNSETIFF = iow(ord("T"), 202, c_int)
TUNSETPERSIST = iow(ord("T"), 203, c_int)
TUNSETOFFLOAD = iow(ord("T"), 208, c_uint)
TUNGETIFF = ior(ord("T"), 210, c_uint)
TUNSETVNETHDRSZ = iow(ord("T"), 216, c_int)
TUNGETDEVNETNS = io(ord("T"), 227)
