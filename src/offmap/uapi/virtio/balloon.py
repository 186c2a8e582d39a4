"""virtio-balloon: features, configuration space (linux/virtio_balloon.h; virtio 1.2, 5.5)."""

from ctypes import LittleEndianStructure

from offmap.uapi.members import u32

VIRTIO_BALLOON_F_DEFLATE_ON_OOM = 2
VIRTIO_BALLOON_F_REPORTING = 5

VIRTIO_BALLOON_PFN_SHIFT = 12


class virtio_balloon_config(LittleEndianStructure):
    """``free_page_hint_cmd_id`` belongs to a feature that is not offered, and stays 0."""

    _fields_ = u32("num_pages actual free_page_hint_cmd_id poison_val")
