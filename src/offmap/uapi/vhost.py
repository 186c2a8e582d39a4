"""vhost: virtqueues served by the host kernel (linux/vhost.h, linux/vhost_types.h)."""

from ctypes import Structure, c_int, c_uint, c_uint64

from offmap.uapi.ioctl import io, ior, iow
from offmap.uapi.members import u32, u64

VHOST_VIRTIO = 0xAF
VHOST_FILE_UNBIND = -1


class vhost_vring_state(Structure):
    _fields_ = u32("index num")


class vhost_vring_file(Structure):
    _fields_ = [("index", c_uint), ("fd", c_int)]


class vhost_vring_addr(Structure):
    _fields_ = [*u32("index flags"), *u64("desc_user_addr used_user_addr avail_user_addr log_guest_addr")]


class vhost_memory_region(Structure):
    _fields_ = u64("guest_phys_addr memory_size userspace_addr flags_padding")


class vhost_memory(Structure):
    """Its head; the regions follow it."""

    _fields_ = u32("nregions padding")


VHOST_GET_FEATURES = ior(VHOST_VIRTIO, 0x00, c_uint64)
VHOST_SET_FEATURES = iow(VHOST_VIRTIO, 0x00, c_uint64)
VHOST_SET_OWNER = io(VHOST_VIRTIO, 0x01)
VHOST_SET_MEM_TABLE = iow(VHOST_VIRTIO, 0x03, vhost_memory)
VHOST_SET_VRING_NUM = iow(VHOST_VIRTIO, 0x10, vhost_vring_state)
VHOST_SET_VRING_ADDR = iow(VHOST_VIRTIO, 0x11, vhost_vring_addr)
VHOST_SET_VRING_BASE = iow(VHOST_VIRTIO, 0x12, vhost_vring_state)
VHOST_SET_VRING_KICK = iow(VHOST_VIRTIO, 0x20, vhost_vring_file)
VHOST_SET_VRING_CALL = iow(VHOST_VIRTIO, 0x21, vhost_vring_file)
VHOST_SET_VRING_ERR = iow(VHOST_VIRTIO, 0x22, vhost_vring_file)
VHOST_NET_SET_BACKEND = iow(VHOST_VIRTIO, 0x30, vhost_vring_file)
