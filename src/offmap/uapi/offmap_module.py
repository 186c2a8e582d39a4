"""The offmap kernel module's own ABI: kernel/module/offmap.h."""

from ctypes import Structure, c_int32, c_uint32, c_uint64

from offmap.uapi.ioctl import io, iowr
from offmap.uapi.members import u32, u64

DEVICE = "/dev/offmap"
POOLS = "/sys/class/misc/offmap/pools"
OFFMAP_ANY_NODE = -1
_OFFMAP = 0xB7


class offmap_unplug(Structure):
    _fields_ = [("size", c_uint64), ("node", c_int32), ("flags", c_uint32)]


class offmap_translate(Structure):
    _fields_ = [("pid", c_int32), *u32("flags"), *u64("addr phys length")]


class offmap_secretmem(Structure):
    _fields_ = [("fd", c_int32), ("flags", c_uint32), ("size", c_uint64)]


OFFMAP_UNPLUG = iowr(_OFFMAP, 0x80, offmap_unplug)
OFFMAP_TRANSLATE = iowr(_OFFMAP, 0x81, offmap_translate)
OFFMAP_BIND_SECRETMEM = iowr(_OFFMAP, 0x82, offmap_secretmem)
OFFMAP_GUARD = io(_OFFMAP, 0x83)
