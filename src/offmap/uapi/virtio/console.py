"""linux/virtio_console.h: feature bits, configuration space, and the messages about ports (virtio 1.2, 5.3)."""

import struct

# Bit numbers.
VIRTIO_CONSOLE_F_SIZE = 0
VIRTIO_CONSOLE_F_MULTIPORT = 1

VIRTIO_CONSOLE_DEVICE_READY = 0
VIRTIO_CONSOLE_PORT_ADD = 1
VIRTIO_CONSOLE_PORT_READY = 3
VIRTIO_CONSOLE_CONSOLE_PORT = 4
VIRTIO_CONSOLE_RESIZE = 5
VIRTIO_CONSOLE_PORT_OPEN = 6
VIRTIO_CONSOLE_PORT_NAME = 7

VIRTIO_CONSOLE_CONFIG = struct.Struct("<HHII")  # struct virtio_console_config: cols, rows, max_nr_ports, emerg_wr
VIRTIO_CONSOLE_CONTROL = struct.Struct("<IHH")  # struct virtio_console_control: id, event, value
VIRTIO_CONSOLE_RESIZE_FORMAT = struct.Struct("<HH")
"""struct virtio_console_resize (5.3.6.2): cols, rows. Linux took them the other way round before 6.16 and
the stable kernels that have its fix (6.12.65; Debian's 6.1.0-56 has it, too)."""
