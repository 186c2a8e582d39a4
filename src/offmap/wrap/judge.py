"""The audit of a wrapped VMM, as a program. Its argument is the PID.

It says in one line what ``offmap audit`` would, and ends as that does; or with ``CLOCK_ALONE`` or ``NO_VM``.
"""

import sys

from msgspec.structs import replace

from offmap.audit.audit import audit_process
from offmap.audit.guest_ram import NoVm
from offmap.audit.process import own_start
from offmap.audit.report.text import verdict_line
from offmap.audit.result import AuditResult, Source
from offmap.audit.verdict import Verdict
from offmap.errors import ExitStatus, OffmapError
from offmap.report.typed import plain
from offmap.uapi.page import PAGE_SIZE
from offmap.wrap.audits import CLOCK_ALONE, NO_VM


def clock_page(result: AuditResult) -> int | None:
    """The guest-physical address of kvm-clock's page, if that is the one page which is exposed."""
    if result.pages.mapped_pages != 1 or result.pages.direct_map_pages or len(result.kvm_clock_pages) != 1:
        return None
    (page,) = result.kvm_clock_pages
    return page if result.mapped_guest_ranges == ((page, PAGE_SIZE),) else None


def said_of(result: AuditResult) -> tuple[int, str]:
    """The exit status and the line. What the VMM calls itself must not pass for a verdict on a terminal."""
    line = plain(verdict_line(result))
    if (page := clock_page(result)) is not None:
        line += f": the guest's page at {page:#x}, which holds kvm-clock, and in Linux nothing else"
        # "Exposed" hides what else could not be judged, and the clock excuses its own page only.
        guessed = any(part.source is Source.GUESS for part in result.ranges)
        rest = replace(result.pages, mapped_pages=0).verdict(guessed)
        if rest is Verdict.HIDDEN and not result.partial:
            return CLOCK_ALONE, line
        why = plain(result.partial) if result.partial else "whether the others are hidden could not be determined"
        return ExitStatus.UNDETERMINED, f"{line}; {why}"
    if result.verdict is Verdict.UNKNOWN and result.notes:
        line += f": {plain(result.notes[0])}"
    return result.verdict.exit_status, line


def judge(pid: int) -> tuple[int, str]:
    """Audit a process; returns the exit status and the line."""
    try:
        # From its start on: the VMM can see it come.
        result = audit_process(pid, since=own_start())
    except NoVm:
        return NO_VM, "it has no VM any more"
    except OffmapError as error:
        return error.exit_status, f"offmap audit: {error}"
    except Exception as error:  # Python would end with 1, which means "exposed"
        return ExitStatus.FAILED, f"this is a bug in offmap: {type(error).__name__}: {error}"
    return said_of(result)


def main() -> None:
    """Audit the process that is named on the command line."""
    exit_status, said = judge(int(sys.argv[1]))
    sys.stdout.write(f"{said}\n")
    sys.exit(exit_status)
