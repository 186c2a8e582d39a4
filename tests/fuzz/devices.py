"""The devices whose host's side is a file or two: drive, entropy, balloon."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from offmap.devices.virtio import disk as disk_module
from offmap.devices.virtio.balloon import Balloon
from offmap.devices.virtio.blk import Blk
from offmap.devices.virtio.device import VirtioDevice
from offmap.devices.virtio.disk import Disk
from offmap.devices.virtio.rng import Rng
from offmap.files import fallocate
from offmap.uapi.virtio import blk

from .choices import Choices
from .rings import HALF, KEPT
from .target import DeviceTarget

_SECTORS = 256
_KINDS = (blk.VIRTIO_BLK_T_IN, blk.VIRTIO_BLK_T_OUT, blk.VIRTIO_BLK_T_FLUSH, blk.VIRTIO_BLK_T_GET_ID)
_RANGED = (blk.VIRTIO_BLK_T_DISCARD, blk.VIRTIO_BLK_T_WRITE_ZEROES)
_ERRORS = (errno.EIO, errno.ENOSPC, errno.EOPNOTSUPP, errno.EFAULT, errno.EINVAL)


def cut(choices: Choices, data: bytes) -> list[bytes]:
    """`data` in one piece, or rarely in several."""
    if not choices.rarely(8):
        return [data]
    at = choices.byte() % (len(data) + 1)
    return [data[:at], data[at:]]


class BlkTarget(DeviceTarget):
    """A drive of 128 KiB. Now and then its host fails."""

    sources = ("devices/virtio/blk.py", "devices/virtio/disk.py")
    readonly = bounce = False

    def build(self) -> VirtioDevice:
        self._fault = 0
        fd = os.memfd_create("fuzzed drive")
        os.ftruncate(fd, _SECTORS * 512)
        target = self

        class Flaky(Disk):
            def read(self, views: list[memoryview], size: int, offset: int) -> None:
                target.fail()
                super().read(views, size, offset)

            def write(self, views: list[memoryview], size: int, offset: int, *, sync: bool = False) -> None:
                target.fail()
                super().write(views, size, offset, sync=sync)

            def flush(self) -> None:
                target.fail()
                super().flush()

        disk = Flaky(Path(f"/proc/self/fd/{fd}"), readonly=self.readonly, bounce=self.bounce, say=lambda _: None)
        os.close(fd)

        def flaky(fd: int, mode: int, offset: int, size: int) -> None:
            self.fail()
            fallocate(fd, mode, offset, size)

        vars(disk_module)["fallocate"] = flaky
        return Blk(disk, readonly=self.readonly, serial="fuzz", say=lambda _: None)

    def fail(self) -> None:
        """Raise the error that the host has now."""
        if self._fault:
            raise OSError(self._fault, os.strerror(self._fault))

    def case(self, choices: Choices) -> bool:
        self._fault = 0
        return super().case(choices)

    def host(self, choices: Choices) -> None:
        self._fault = choices.of(_ERRORS) if choices.byte() & 1 else 0

    def buffer(self, choices: Choices, queue: int) -> tuple[Sequence[bytes], Sequence[int]]:
        c = choices
        what = c.byte()
        if what < 200:
            kind, sector = _KINDS[what & 3], c.byte()
            size = 512 * (what >> 3 & 7)
            if what < 8:
                sector, size = c.word(8), c.word(2)
            reads = cut(c, blk.VIRTIO_BLK_OUTHDR.pack(kind, 0, sector & (1 << 64) - 1))
            if kind == blk.VIRTIO_BLK_T_OUT:
                return [*reads, bytes(size)], [1]
            if kind == blk.VIRTIO_BLK_T_IN:
                return reads, [size, 1] if what & 64 else [size + 1]
            return reads, [20, 1] if kind == blk.VIRTIO_BLK_T_GET_ID else [1]
        if what < 240:
            ranges = b""
            for _ in range(1 + (c.byte() & 3)):
                count = c.byte() if c.byte() < 250 else c.word(4)
                flags = 0 if c.byte() < 200 else c.byte()
                ranges += blk.VIRTIO_BLK_DISCARD_WRITE_ZEROES.pack(c.byte() % _SECTORS, count, flags)
            if c.rarely(16):
                ranges = ranges[:-1]
            kind = _RANGED[what & 1]
            if kind == blk.VIRTIO_BLK_T_WRITE_ZEROES and not c.rarely(8):
                ranges = ranges[:16]
            return [*cut(c, blk.VIRTIO_BLK_OUTHDR.pack(kind, 0, 0)), *cut(c, ranges)], [1]
        return [c.bytes(c.byte() % 20)], [c.byte() % 4 for _ in range(c.byte() & 3)]

    def close(self) -> None:
        super().close()
        vars(disk_module)["fallocate"] = fallocate


class ReadonlyBlkTarget(BlkTarget):
    """A drive that cannot be written."""

    readonly = True


class BouncedBlkTarget(BlkTarget):
    """A drive whose data goes through a buffer of the VMM's."""

    bounce = True


class RngTarget(DeviceTarget):
    """Entropy, of a source that rarely does not take guest memory."""

    sources = ("devices/virtio/rng.py",)

    def build(self) -> VirtioDevice:
        return Rng(os.open("/dev/urandom", os.O_RDONLY | os.O_CLOEXEC))

    def buffer(self, choices: Choices, queue: int) -> tuple[Sequence[bytes], Sequence[int]]:
        reads = [bytes(choices.byte())] if choices.rarely(16) else []
        return reads, [choices.byte() for _ in range(1 + choices.byte() % 4)]


class BalloonTarget(DeviceTarget):
    """A balloon in memory that can be given back."""

    sources = ("devices/virtio/balloon.py",)

    def build(self) -> VirtioDevice:
        return Balloon(self.ram.memory, 8, lambda _: None)

    def buffer(self, choices: Choices, queue: int) -> tuple[Sequence[bytes], Sequence[int]]:
        c = choices
        if queue >= 2:
            return [], [4096 * (c.byte() & 3) for _ in range(1 + (c.byte() & 3))]
        pages = [HALF // 4096 + c.byte() % 120 for _ in range(c.byte() % 12)]
        if c.rarely(12):
            pages.append(c.of((1 << 20, KEPT.start // 4096, 0xFFFFFFFF, 0)))
        if c.rarely(64):
            pages *= 700
        data = b"".join(page.to_bytes(4, "little") for page in pages)
        if c.rarely(16):
            data += b"\1"
        return cut(c, data), [4] if c.rarely(32) else []
