"""virtio-balloon: features, configuration space, statistics (linux/virtio_balloon.h; virtio 1.2, 5.5)."""

import struct
from ctypes import LittleEndianStructure, c_uint32

__all__ = ["VIRTIO_BALLOON_STAT", "virtio_balloon_config"]

VIRTIO_BALLOON_F_MUST_TELL_HOST = 0
VIRTIO_BALLOON_F_STATS_VQ = 1
VIRTIO_BALLOON_F_DEFLATE_ON_OOM = 2
VIRTIO_BALLOON_F_PAGE_POISON = 4
VIRTIO_BALLOON_F_REPORTING = 5

VIRTIO_BALLOON_PFN_SHIFT = 12

VIRTIO_BALLOON_S_SWAP_IN = 0
VIRTIO_BALLOON_S_SWAP_OUT = 1
VIRTIO_BALLOON_S_MAJFLT = 2
VIRTIO_BALLOON_S_MINFLT = 3
VIRTIO_BALLOON_S_MEMFREE = 4
VIRTIO_BALLOON_S_MEMTOT = 5
VIRTIO_BALLOON_S_AVAIL = 6
VIRTIO_BALLOON_S_CACHES = 7

VIRTIO_BALLOON_STAT = struct.Struct("<HQ")
"""struct virtio_balloon_stat: tag, val."""


class virtio_balloon_config(LittleEndianStructure):
    """``free_page_hint_cmd_id`` belongs to a feature that is not offered, and stays 0."""

    _fields_ = [
        ("num_pages", c_uint32),
        ("actual", c_uint32),
        ("free_page_hint_cmd_id", c_uint32),
        ("poison_val", c_uint32),
    ]
