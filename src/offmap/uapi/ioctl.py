"""ioctl request numbers, computed as include/uapi/asm-generic/ioctl.h computes them."""

import ctypes

_IOC_NRSHIFT = 0
_IOC_TYPESHIFT = 8
_IOC_SIZESHIFT = 16
_IOC_DIRSHIFT = 30

_IOC_NONE = 0
_IOC_WRITE = 1
_IOC_READ = 2

type_of_argument = type[ctypes.Structure] | type["ctypes._SimpleCData[int]"]


def _ioc(direction: int, type_: int, number: int, size: int) -> int:
    return direction << _IOC_DIRSHIFT | size << _IOC_SIZESHIFT | type_ << _IOC_TYPESHIFT | number << _IOC_NRSHIFT


def io(type_: int, number: int) -> int:
    """``_IO``: no argument, or one passed by value."""
    return _ioc(_IOC_NONE, type_, number, 0)


def ior(type_: int, number: int, argument: "type_of_argument") -> int:
    """``_IOR``: the kernel writes `argument`."""
    return _ioc(_IOC_READ, type_, number, ctypes.sizeof(argument))


def iow(type_: int, number: int, argument: "type_of_argument") -> int:
    """``_IOW``: the kernel reads `argument`."""
    return _ioc(_IOC_WRITE, type_, number, ctypes.sizeof(argument))


def iowr(type_: int, number: int, argument: "type_of_argument") -> int:
    """``_IOWR``: the kernel reads and writes `argument`."""
    return _ioc(_IOC_READ | _IOC_WRITE, type_, number, ctypes.sizeof(argument))
