"""Why a host ended, and what cannot be seen in one."""

from pathlib import Path

import pytest

from offmap.lab.console import Console
from offmap.lab.errors import LabEnded, LabError, LabPanic
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
    assert settings(KERNEL, HostOptions(1 << 30, out=Path("/tmp/x")))["out"] == "/tmp/x"
    with pytest.raises(LabError, match="/run/x cannot be seen in a lab host, which has its own /run; move it"):
        settings(KERNEL, HostOptions(1 << 30, out=Path("/run/x")))
