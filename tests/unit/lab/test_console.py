"""Finding a panic on the console."""

import io

from offmap.lab.console import Console, panic_report
from offmap.lab.errors import LabPanic

OOPS = """\
[    1.0] amd_pstate: something harmless
[    5.1] BUG: unable to handle page fault for address: ffff888012345000
[    5.2] Oops: 0000 [#1] PREEMPT SMP NOPTI
[    5.3] RIP: 0010:kvm_guest_time_update+0x1
[    5.4] Kernel panic - not syncing: Fatal exception in interrupt
[    5.5] Rebooting
"""


def test_report_begins_with_the_oops() -> None:
    report = panic_report(OOPS)
    assert report
    assert report.startswith("[    5.1] BUG: unable")
    assert report.endswith("Rebooting\n")
    assert "kvm_guest_time_update" in LabPanic(report).oops
    assert "page fault" in str(LabPanic(report))


def test_panic_without_an_oops() -> None:
    assert panic_report("x\n[1] Kernel panic - not syncing: sysrq\n") == "[1] Kernel panic - not syncing: sysrq\n"


def test_warning_is_no_panic() -> None:
    assert panic_report("[1] BUG: sleeping function\n[2] WARNING: at x\n") is None


def test_console_notices_a_panic_across_pieces() -> None:
    lines: list[str] = []
    copy = io.BytesIO()
    console = Console(copy, lines.append)
    assert not console.feed(b"one\r\n[1] Kernel pa")
    assert console.feed(b"nic - not syncing: x\r\n")
    assert lines == ["one", "[1] Kernel panic - not syncing: x"]
    assert console.text == "one\n[1] Kernel panic - not syncing: x\n"
    assert copy.getvalue().startswith(b"one\r\n")
    assert console.tail(1) == "[1] Kernel panic - not syncing: x"
