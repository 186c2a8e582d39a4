"""Character devices by their numbers: Documentation/admin-guide/devices.txt, drivers/char/mem.c, linux/miscdevice.h."""

import os

MISC_MAJOR = 10
DEV_MEM = os.makedev(1, 1)
DEV_KVM = os.makedev(MISC_MAJOR, 232)
PHYSICAL_MEMORY = frozenset({DEV_MEM, os.makedev(1, 2), os.makedev(1, 4)})
"""/dev/mem, /dev/kmem and /dev/port."""
