"""Members of C structures, for ctypes: ``_fields_ = [*u32("slot flags"), *u64("size"), ("pad", c_uint8 * 4)]``."""

from ctypes import c_uint8, c_uint16, c_uint32, c_uint64

Members = list[tuple[str, type]]


def u8(names: str) -> Members:
    return [(name, c_uint8) for name in names.split()]


def u16(names: str) -> Members:
    return [(name, c_uint16) for name in names.split()]


def u32(names: str) -> Members:
    return [(name, c_uint32) for name in names.split()]


def u64(names: str) -> Members:
    return [(name, c_uint64) for name in names.split()]
