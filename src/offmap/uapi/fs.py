"""Block devices and holes in files: linux/fs.h, linux/falloc.h."""

from offmap.uapi.ioctl import io

BLKSSZGET = io(0x12, 104)  # int: the logical block size
BLKDISCARD = io(0x12, 119)  # uint64_t range[2]: start and length in bytes
BLKPBSZGET = io(0x12, 123)  # unsigned int: the physical block size
BLKZEROOUT = io(0x12, 127)  # as BLKDISCARD

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10
