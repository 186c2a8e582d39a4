"""Why a host ended, and what cannot be seen in one."""

import time
from pathlib import Path

import pytest

from offmap.lab.console import Console
from offmap.lab.errors import LabEnded, LabError, LabPanic
from offmap.lab.guest.root import Settings
from offmap.lab.kernel import HostKernel
from offmap.lab.process import diagnose, settings
from offmap.lab.qemu import HostOptions

KERNEL = HostKernel("test", "6.12.1", Path("/k"), Path("/m"))


def console(text: str) -> Console:
    made = Console()
    made.feed(text.encode())
    return made


def test_panic_wins() -> None:
    assert isinstance(diagnose(console("offmap-lab: x\n[1] Kernel panic - not syncing: y\n"), 0), LabPanic)


@pytest.mark.parametrize(
    ("text", "status", "reason"),
    [
        ("[1] x\nqemu-system-x86_64: cannot set up guest memory\n", 1, "cannot set up guest memory"),
        ("offmap-lab: cannot mount the machine's files over 9p\n", 0, "over 9p"),
        ("[1] reboot: Power down\n", 0, "ended with status 0"),
        ("", -9, "killed by signal 9"),
    ],
)
def test_other_ends(text: str, status: int, reason: str) -> None:
    error = diagnose(console(text), status)
    assert isinstance(error, LabEnded)
    assert reason in str(error)


def test_output_folder_must_be_visible_there() -> None:
    with pytest.raises(LabError, match="/run/x cannot be seen in a lab host, which has its own /run; move it"):
        settings(KERNEL, HostOptions(1 << 30, out=Path("/run/x")), "token")


def test_a_host_reads_what_it_is_told() -> None:
    first, second = (Settings(settings(KERNEL, HostOptions(1 << 30, out=Path("/tmp/x")), "token")) for _ in range(2))
    assert (first.modules, first.out, first.token) == ("/m", "/tmp/x", "token")
    assert abs(first.time - time.time_ns()) < 3600e9
    assert len(first.entropy) == 256
    assert first.entropy != second.entropy
    assert first.name != second.name
    assert Settings(settings(KERNEL, HostOptions(1 << 30), "")).out == ""
