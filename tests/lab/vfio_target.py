"""What test_pool.py does with a device that user space drives: QEMU's ``edu``, in a host that has an IOMMU."""

import fcntl
import json
import mmap
import os
import struct
from pathlib import Path
from typing import Any

from .module_host_target import SYSFS
from .module_target import MIB, address, await_returned, failure, words
from .pool_target import SIZE, figures, make, mount, unlink, unmount

DEVICE = Path("/sys/bus/pci/devices/0000:00:10.0")
# linux/vfio.h: _IO(';', 100 + n)
SET_IOMMU, SET_CONTAINER, GET_DEVICE_FD, GET_REGION_INFO, MAP_DMA = (0x3B64 + n for n in (2, 4, 6, 8, 13))
TYPE1_IOMMU = 1
DMA_READ_WRITE = 3
BAR0, CONFIG = 0, 7
COMMAND, MASTER = 4, 4  # linux/pci_regs.h
# QEMU's docs/specs/edu.rst
SOURCE, TARGET, COUNT, START = 0x80, 0x88, 0x90, 0x98
BUFFER = 0x40000
LENGTH = 2048  # QEMU 7.2 ends with all of the buffer
FROM_RAM, TO_RAM = 1, 3


class Edu:
    """The device, opened through VFIO: it copies a page from or to guest RAM."""

    def __init__(self) -> None:
        self.container = os.open("/dev/vfio/vfio", os.O_RDWR | os.O_CLOEXEC)
        self.group = os.open(f"/dev/vfio/{(DEVICE / 'iommu_group').readlink().name}", os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(self.group, SET_CONTAINER, struct.pack("i", self.container))
        fcntl.ioctl(self.container, SET_IOMMU, TYPE1_IOMMU)
        self.device = fcntl.ioctl(self.group, GET_DEVICE_FD, bytearray(DEVICE.name.encode() + b"\0"))
        self._write(CONFIG, COMMAND, self._read(CONFIG, COMMAND) | MASTER)

    def _at(self, region: int) -> int:
        info = fcntl.ioctl(self.device, GET_REGION_INFO, struct.pack("=IIIIQQ", 32, 0, region, 0, 0, 0))
        return int(struct.unpack("=IIIIQQ", info)[5])

    def _read(self, region: int, at: int) -> int:
        return int.from_bytes(os.pread(self.device, 4, self._at(region) + at), "little")

    def _write(self, region: int, at: int, value: int) -> None:
        os.pwrite(self.device, value.to_bytes(4, "little"), self._at(region) + at)

    def map(self, memory: mmap.mmap, size: int) -> None:
        """Let the device reach memory, from its address 0 on."""
        fcntl.ioctl(self.container, MAP_DMA, struct.pack("=IIQQQ", 32, DMA_READ_WRITE, address(memory), 0, size))

    def copy(self, how: int) -> None:
        """Copy LENGTH bytes from its address 0, where RAM is, to the device, or back."""
        for at, value in ((SOURCE, 0), (TARGET, BUFFER)) if how == FROM_RAM else ((SOURCE, BUFFER), (TARGET, 0)):
            self._write(BAR0, at, value)
        self._write(BAR0, COUNT, LENGTH)
        self._write(BAR0, START, how)
        while self._read(BAR0, START) & 1:
            os.sched_yield()

    def close(self) -> None:
        for fd in (self.device, self.group, self.container):
            os.close(fd)


def bind() -> None:
    (DEVICE / "driver_override").write_text("vfio-pci")
    Path("/sys/bus/pci/drivers_probe").write_text(DEVICE.name)


def a_file_ends(edu: Edu) -> bool:
    """Whether the device reaches a file, which then ends, with the device's mapping of it left as it is."""
    fd = make("ram", 4 * MIB)
    memory = mmap.mmap(fd, 4 * MIB)
    edu.map(memory, 4 * MIB)
    words(memory)[: LENGTH // 8] = 0x5EC2E7
    edu.copy(FROM_RAM)
    words(memory)[: LENGTH // 8] = 0
    edu.copy(TO_RAM)
    reached = bool((words(memory)[: LENGTH // 8] == 0x5EC2E7).all())
    del memory
    os.close(fd)
    unlink("ram")
    while figures()[2]:
        os.sched_yield()
    return reached


def run(options: str) -> Any:
    """What becomes of a file's memory while the device that it was mapped for stays open, and afterwards."""
    result: dict[str, Any] = {}
    mount(f"size={SIZE},mode=700,allow_nested{options}")
    edu = Edu()
    result["reached"] = a_file_ends(edu)
    result["held"] = figures()[3]
    result["given out again"] = failure(lambda: os.close(make("all", SIZE)))
    with open("/run/hidden/all", "r+b") as file:  # noqa: PTH123
        if not result["given out again"]:
            # The control: what the device can still do to another's file.
            memory = mmap.mmap(file.fileno(), SIZE)
            edu.copy(TO_RAM)
            result["written to another's"] = bool((words(memory) == 0x5EC2E7).any())
            del memory
    unlink("all")
    with open("/dev/kmsg", "rb", buffering=0) as log:  # noqa: PTH123
        os.lseek(log.fileno(), 0, os.SEEK_END)
        if not result["held"]:
            edu.close()  # VFIO would take what has gone back for pages of the kernel's that it had pinned
        unmount()
        if result["held"]:
            # Nor does the kernel get it.
            while b"cannot go back yet" not in os.read(log.fileno(), 8192):
                pass
            result["returning"] = int((SYSFS / "returning").read_text())
            edu.close()
    result["at the end"] = await_returned()
    return result


if __name__ == "__main__":
    bind()
    print(json.dumps({"default": run(""), "allow_vfio": run(",allow_vfio")}))
