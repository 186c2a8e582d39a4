"""virtio 1.2 devices on the modern MMIO transport.

- queue: the split virtqueue, every field of which a hostile driver may set to anything
- dma: which guest memory a device may reach
- device: what a device is (VirtioDevice), what it is made from (DeviceSpec)
- worker: the thread that a device lives on
- mmio: the transport's registers
- one file per device: blk, rng, ...
"""
