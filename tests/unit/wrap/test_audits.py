"""What the end of an audit means for a wrapped VMM."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import offmap
from offmap.errors import ExitStatus
from offmap.wrap.audits import CLOCK_ALONE, NO_VM, Audit, answer_of
from offmap.wrap.policy import Policy


def test_only_an_audit_that_ended_well_says_hidden() -> None:
    answer = answer_of(0, "HIDDEN: none of the 9 guest pages of vmm (7) is mapped\n\n  guest RAM  9\n", 7)
    assert (answer.line, answer.status) == ("HIDDEN: none of the 9 guest pages of vmm (7) is mapped", ExitStatus.DONE)
    answer = answer_of(1, "EXPOSED: 1 of 9 guest pages of vmm (7) are mapped\n", 7)
    assert (answer.line, answer.status) == ("EXPOSED: 1 of 9 guest pages of vmm (7) are mapped", ExitStatus.EXPOSED)


def test_kvm_clocks_page_alone_is_exposed_all_the_same() -> None:
    answer = answer_of(CLOCK_ALONE, "EXPOSED: 1 of 9 guest pages of vmm (7) are mapped: kvm-clock\n", 7)
    assert (answer.status, answer.clock_alone) == (ExitStatus.EXPOSED, True)


def test_a_process_without_a_vm_has_no_verdict() -> None:
    answer = answer_of(NO_VM, "it has no VM any more\n", 7)
    assert (answer.line, answer.status) == ("it has no VM any more", None)
    assert not Policy(kill_undetermined=True).ends(answer.status)


def test_the_audit_is_found_where_the_supervisor_was_started_from() -> None:
    """Python of the system finds offmap in its current folder only, and the supervisor leaves that."""
    begun = "import os, select, sys; sys.path += sys.argv[1:]; from offmap.wrap.audits import Audit; os.chdir('/')"
    judged = "audit = Audit(1 << 22); audit.hurry(); select.select([audit.fd], [], []); print(audit.answer().line)"
    packages = [path for path in sys.path if path.endswith("-packages")]
    python = [sys._base_executable, "-E", "-c", f"{begun}; {judged}"]  # type: ignore[attr-defined]
    source = Path(offmap.__file__).parents[1]
    done = subprocess.run([*python, *packages], cwd=source, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("placed, not audited: ")
    assert "No module named" not in done.stdout


@pytest.mark.parametrize(
    ("status", "said", "reason"),
    [
        (3, "UNKNOWN: it cannot be told\n\nguest RAM", "UNKNOWN: it cannot be told"),
        (2, "offmap audit: reading /proc/kcore failed: EACCES; run as root\n", "reading /proc/kcore failed"),
        (-9, "", "it said nothing"),
        (1, "Traceback (most recent call last):\nImportError: no", "ImportError: no"),
        (-9, "HIDDEN: but it was killed", "HIDDEN: but it was killed"),
    ],
)
def test_all_else_is_placed_and_not_audited(status: int, said: str, reason: str) -> None:
    answer = answer_of(status, said, 7)
    assert answer.line.startswith(f"placed, not audited: {reason}")
    assert answer.line.endswith("(again: offmap audit 7)")
    assert answer.status is ExitStatus.UNDETERMINED


def test_an_audit_gives_way_to_others_until_it_is_to_hurry() -> None:
    with Audit(os.getpid()) as audit:
        said = Path(f"/proc/self/fdinfo/{audit.fd}").read_text()
        child = int(re.findall(r"^Pid:\s+(\d+)$", said, re.MULTILINE)[0])
        assert os.sched_getscheduler(child) == os.SCHED_IDLE
        assert (left := audit.patience()) is not None
        assert 0 < left <= 30
        audit.hurry()
        assert audit.patience() is None
        if os.getuid() == 0:
            assert os.sched_getscheduler(child) == os.SCHED_OTHER
