"""One command in a guest: how it gets there, and what its end is taken for."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from offmap.boot.linux import BootSource
from offmap.devices.virtio.console import ConsoleSpec
from offmap.errors import OffmapError
from offmap.guests import job as module
from offmap.guests.job import MAX_COMMAND, Job
from offmap.hide import Vet
from offmap.lab.cpio import newc, regular
from offmap.memory.backend import parse_backend
from offmap.vmm.config import MachineConfig
from offmap.vmm.outcome import Outcome, Stop


class FakeGuest:
    """In place of the machine: looks at what it is given, and says that it has ended."""

    says = b""
    stop = Stop(Outcome.POWERED_OFF)
    last_words = "Kernel panic - not syncing"
    initrd = b""
    names: tuple[str, ...] = ()

    def __init__(self, config: MachineConfig, finished: int, **_: Any) -> None:
        name, spec = config.devices[-1]
        assert name == "exec"
        assert isinstance(spec, ConsoleSpec)
        assert config.source.initrd is not None
        FakeGuest.initrd = Path(config.source.initrd).read_bytes()
        FakeGuest.names = tuple(port.name for port in spec.ports)
        status = spec.ports[-1]
        assert status.last and status.output is not None
        if self.says:
            os.write(status.output, self.says)

    def run(self) -> Stop:
        return self.stop


Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Give a function that runs a command in a guest that says this on its status port, and ends like this."""
    initrd = tmp_path / "initrd.img"
    initrd.write_bytes(b"070701 and so on.")
    config = MachineConfig(
        BootSource(tmp_path / "vmlinuz", initrd, "quiet"), parse_backend("anon"), 1 << 28, vetting=Vet()
    )
    monkeypatch.setattr(module, "Headless", FakeGuest)

    def run(command: str, says: bytes = b"", stop: Stop | None = None) -> int:
        monkeypatch.setattr(FakeGuest, "says", says)
        monkeypatch.setattr(FakeGuest, "stop", stop or Stop(Outcome.POWERED_OFF))
        with Job(command) as job:
            return job.run(config, say=lambda _: None)

    yield run


def test_the_command_is_behind_the_images_own_initrd(run: Run) -> None:
    assert run("echo 'a b' | wc -c\nexit 3", b"exit 3\n") == 3
    own = b"070701 and so on."
    archive = newc([regular("exec", b"echo 'a b' | wc -c\nexit 3")])
    # The kernel takes several archives one behind the other, each at a multiple of four bytes.
    assert FakeGuest.initrd == own + bytes(3) + archive
    assert FakeGuest.names == ("stdin", "stdout", "stderr", "status")


@pytest.mark.parametrize("status", [0, 1, 125, 137, 255])
def test_its_status_is_ours(run: Run, status: int) -> None:
    assert run("true", b"exit %d\n" % status) == status


@pytest.mark.parametrize("says", [b"", b"exit 256\n", b"exit 1", b"exit -1\n", b"exit 0x1\n", b"\xff" * 64])
def test_a_guest_that_ends_without_a_status_is_no_success(run: Run, says: bytes) -> None:
    with pytest.raises(OffmapError, match=r"the guest ended before the command did .its console: Kernel panic"):
        run("true", says)
    with pytest.raises(OffmapError, match="the guest reset itself before the command did"):
        run("true", says, Stop(Outcome.RESET))


def test_a_machine_that_failed_is_the_error(run: Run) -> None:
    with pytest.raises(OffmapError, match=r"^it broke$"):
        run("true", b"exit 0\n", Stop(Outcome.FAILED, OffmapError("it broke")))


@pytest.mark.parametrize("command", ["", " \n", "a\0b", "x" * (MAX_COMMAND + 1)])
def test_what_is_no_command_is_refused(command: str) -> None:
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    with pytest.raises(OffmapError, match="--exec takes a command"):
        Job(command)
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208
