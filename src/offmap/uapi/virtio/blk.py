"""linux/virtio_blk.h: the block device (virtio 1.2, section 5.2)."""

from ctypes import LittleEndianStructure, c_uint8
from struct import Struct

from offmap.uapi.members import u8, u16, u32, u64

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
    _fields_ = [*u16("cylinders"), *u8("heads sectors")]


class virtio_blk_config(LittleEndianStructure):
    """Up to the fields of VIRTIO_BLK_F_WRITE_ZEROES; what the header has behind them is newer."""

    _pack_ = 1
    _fields_ = [
        *u64("capacity"),
        *u32("size_max seg_max"),
        ("geometry", virtio_blk_geometry),
        *u32("blk_size"),
        *u8("physical_block_exp alignment_offset"),
        *u16("min_io_size"),
        *u32("opt_io_size"),
        *u8("wce unused"),
        *u16("num_queues"),
        *u32(
            "max_discard_sectors max_discard_seg discard_sector_alignment max_write_zeroes_sectors max_write_zeroes_seg"
        ),
        *u8("write_zeroes_may_unmap"),
        ("unused1", c_uint8 * 3),
    ]
