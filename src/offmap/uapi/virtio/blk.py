"""linux/virtio_blk.h: the block device (virtio 1.2, section 5.2)."""

from ctypes import LittleEndianStructure, c_uint8, c_uint16, c_uint32, c_uint64
from struct import Struct

# Bit numbers.
VIRTIO_BLK_F_SEG_MAX = 2
VIRTIO_BLK_F_RO = 5
VIRTIO_BLK_F_BLK_SIZE = 6
VIRTIO_BLK_F_FLUSH = 9
VIRTIO_BLK_F_TOPOLOGY = 10
VIRTIO_BLK_F_DISCARD = 13
VIRTIO_BLK_F_WRITE_ZEROES = 14

VIRTIO_BLK_ID_BYTES = 20

VIRTIO_BLK_T_IN = 0
VIRTIO_BLK_T_OUT = 1
VIRTIO_BLK_T_FLUSH = 4
VIRTIO_BLK_T_GET_ID = 8
VIRTIO_BLK_T_DISCARD = 11
VIRTIO_BLK_T_WRITE_ZEROES = 13

VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP = 0x00000001

VIRTIO_BLK_S_OK = 0
VIRTIO_BLK_S_IOERR = 1
VIRTIO_BLK_S_UNSUPP = 2

VIRTIO_BLK_OUTHDR = Struct("<IIQ")
"""struct virtio_blk_outhdr: type, ioprio, sector (of 512 bytes, whatever the block size)."""

VIRTIO_BLK_DISCARD_WRITE_ZEROES = Struct("<QII")
"""struct virtio_blk_discard_write_zeroes: sector, num_sectors, flags."""


class virtio_blk_geometry(LittleEndianStructure):
    _pack_ = 1
    _fields_ = [("cylinders", c_uint16), ("heads", c_uint8), ("sectors", c_uint8)]


class virtio_blk_config(LittleEndianStructure):
    """Up to the fields of VIRTIO_BLK_F_WRITE_ZEROES; what the header has behind them is newer."""

    _pack_ = 1
    _fields_ = [
        ("capacity", c_uint64),
        ("size_max", c_uint32),
        ("seg_max", c_uint32),
        ("geometry", virtio_blk_geometry),
        ("blk_size", c_uint32),
        ("physical_block_exp", c_uint8),
        ("alignment_offset", c_uint8),
        ("min_io_size", c_uint16),
        ("opt_io_size", c_uint32),
        ("wce", c_uint8),
        ("unused", c_uint8),
        ("num_queues", c_uint16),
        ("max_discard_sectors", c_uint32),
        ("max_discard_seg", c_uint32),
        ("discard_sector_alignment", c_uint32),
        ("max_write_zeroes_sectors", c_uint32),
        ("max_write_zeroes_seg", c_uint32),
        ("write_zeroes_may_unmap", c_uint8),
        ("unused1", c_uint8 * 3),
    ]
