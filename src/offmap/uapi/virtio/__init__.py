"""virtio's ABI, one file per header of include/uapi/linux: virtio_config.h and virtio_ids.h (config), virtio_ring.h …

Spelled as the headers spell it; tests/unit/uapi compares every constant with the installed headers.
"""
