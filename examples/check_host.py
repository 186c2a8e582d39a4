"""Audit every VM of this host, and exit as Nagios and its kin expect of a check.

    sudo python examples/check_host.py

0 OK: all hidden. 2 CRITICAL: one is exposed. 3 UNKNOWN: it could not be determined, or there is no VM.
"""

import sys

import offmap

OK, CRITICAL, UNKNOWN = 0, 2, 3
STATUS = {offmap.ExitStatus.DONE: OK, offmap.ExitStatus.EXPOSED: CRITICAL}


def main() -> int:
    """Print one line, with performance data behind the bar."""
    try:
        host = offmap.audit_host()
    except offmap.OffmapError as error:
        print(f"UNKNOWN - {error}")
        return UNKNOWN
    vms = len(host.vms) + len(host.not_audited)
    if not vms:
        print("UNKNOWN - there is no VM on this host")
        return UNKNOWN
    exposed = [result for result in host.vms if result.verdict is offmap.Verdict.EXPOSED]
    pages = sum(result.pages.mapped_pages for result in exposed)
    status = STATUS.get(host.exit_status, UNKNOWN)
    word = {OK: "OK", CRITICAL: "CRITICAL", UNKNOWN: "UNKNOWN"}[status]
    print(f"{word} - {len(exposed)} of {vms} VMs exposed | exposed={len(exposed)} vms={vms} mapped_pages={pages}")
    return status


if __name__ == "__main__":
    sys.exit(main())
