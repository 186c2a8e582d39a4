"""Where the devices are: what is left of a machine's devices when they cannot all be made."""

import errno
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from offmap.devices.bus import MmioBus
from offmap.devices.virtio.bus import VirtioBus
from offmap.devices.virtio.device import Surroundings
from offmap.devices.virtio.rng import RngSpec
from offmap.devices.virtio.worker import Worker
from offmap.errors import OffmapError
from offmap.kvm import Vm
from offmap.memory.anon import Anon

from .driver import guest_memory


class NoVm:
    """As much of KVM as the bus needs, and no optional part of it."""

    def check_extension(self, _: int) -> int:
        return 0

    def irqfd(self, fd: int, gsi: int) -> None:
        pass

    def ioeventfd(self, fd: int, address: int, size: int, *, datamatch: int) -> None:
        pass


def open_fds() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def build_and_close() -> None:
    """Two devices; whatever comes of it, nothing is left."""
    with guest_memory() as memory, mmap.mmap(-1, 4096) as area:
        surroundings = Surroundings(memory, Anon, cast(Vm, NoVm()))
        specs = [("rng0", RngSpec()), ("rng1", RngSpec())]
        with VirtioBus(specs, surroundings, [], MmioBus(), area):
            pass


def test_a_process_that_runs_out_of_fds_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    build_and_close()
    before, real = open_fds(), os.eventfd
    for most in range(100):
        left = most

        def eventfd(value: int, flags: int) -> int:
            nonlocal left
            if not left:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            left -= 1
            return real(value, flags)

        monkeypatch.setattr(os, "eventfd", eventfd)
        try:
            build_and_close()
        except OSError as error:
            assert error.errno == errno.EMFILE
        else:
            break
        finally:
            assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("virtio")]
            assert open_fds() == before
    assert most == 6, "for each device an interrupt, a queue and its thread"


def test_a_process_that_may_start_no_thread_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    build_and_close()
    before = open_fds()

    def worker(name: str, on_error: Callable[[Exception], None], *, start: bool = True) -> Worker:
        if name == "virtio rng1":
            raise OffmapError("no more threads")
        return Worker(name, on_error, start=start)

    monkeypatch.setattr("offmap.devices.virtio.mmio.Worker", worker)
    with pytest.raises(OffmapError, match="no more threads"):
        build_and_close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("virtio")]
    assert open_fds() == before


def test_registers_lie_in_guest_memory_and_no_device_reaches_them() -> None:
    registers, pages = 0xA0000, 2
    with guest_memory() as memory, mmap.mmap(-1, 4096) as area:
        specs = [("rng0", RngSpec()), ("rng1", RngSpec())]
        with VirtioBus(specs, Surroundings(memory, Anon, cast(Vm, NoVm())), [], MmioBus(), area) as bus:
            assert [memory.read(registers + n * 4096, 4) for n in range(pages)] == [b"virt"] * pages
            reached = [(start, end) for start, end, _ in bus.dma.pieces()]
            assert reached == [(0, registers), (registers + pages * 4096, 1 << 20)]
