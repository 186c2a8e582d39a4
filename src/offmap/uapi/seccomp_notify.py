"""Seccomp filters with user notification, beside what seccomp.py has of filters: linux/seccomp.h, linux/filter.h."""

from ctypes import Structure, c_int32, c_int64, c_uint64

from offmap.uapi.ioctl import iow, iowr
from offmap.uapi.members import u8, u16, u32, u64

SECCOMP_FILTER_FLAG_NEW_LISTENER = 1 << 3
SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV = 1 << 5  # Linux 5.19

SECCOMP_RET_USER_NOTIF = 0x7FC00000

SECCOMP_USER_NOTIF_FLAG_CONTINUE = 1 << 0

PR_SET_PTRACER = 0x59616D61  # linux/prctl.h

X32_SYSCALL_BIT = 0x40000000  # asm/unistd.h


class sock_filter(Structure):
    _fields_ = [*u16("code"), *u8("jt jf"), *u32("k")]


class sock_fprog(Structure):
    _fields_ = [*u16("len"), *u64("filter")]


class seccomp_data(Structure):
    _fields_ = [("nr", c_int32), *u32("arch"), *u64("instruction_pointer"), ("args", c_uint64 * 6)]


class seccomp_notif(Structure):
    _fields_ = [*u64("id"), *u32("pid flags"), ("data", seccomp_data)]


class seccomp_notif_resp(Structure):
    _fields_ = [*u64("id"), ("val", c_int64), ("error", c_int32), *u32("flags")]


class seccomp_notif_addfd(Structure):
    _fields_ = [*u64("id"), *u32("flags srcfd newfd newfd_flags")]


_SECCOMP = ord("!")
SECCOMP_IOCTL_NOTIF_RECV = iowr(_SECCOMP, 0, seccomp_notif)
SECCOMP_IOCTL_NOTIF_SEND = iowr(_SECCOMP, 1, seccomp_notif_resp)
SECCOMP_IOCTL_NOTIF_ID_VALID = iow(_SECCOMP, 2, c_uint64)
SECCOMP_IOCTL_NOTIF_ADDFD = iow(_SECCOMP, 3, seccomp_notif_addfd)
