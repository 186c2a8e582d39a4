"""An audit of every VM on a host: one result each, or why there is none, and the worst of them."""

from collections.abc import Callable, Sequence

import offmap
from offmap.audit.host import host_facts, utc_now
from offmap.audit.oracle import OracleDisagrees
from offmap.audit.process import NoSuchProcess, ProcessEnded
from offmap.audit.result import AuditResult
from offmap.audit.result_sets import EveryVm, NotAudited
from offmap.audit.vms import VmProcess, find_vms
from offmap.errors import ExitStatus, OffmapError

_GRAVITY = (ExitStatus.DONE, ExitStatus.FAILED, ExitStatus.UNDETERMINED, ExitStatus.EXPOSED)


def worst_status(statuses: Sequence[ExitStatus], notes: Sequence[str]) -> ExitStatus:
    """Exposed before undetermined before failed before hidden. No VM at all is nothing exposed.

    Args:
        notes: reasons why there may be more VMs; any makes it undetermined at best.
    """
    found = [*statuses, ExitStatus.UNDETERMINED] if notes else statuses
    return max(found, key=_GRAVITY.index, default=ExitStatus.DONE)


def audit_every_vm(audit: Callable[[VmProcess], AuditResult]) -> EveryVm:
    """Find all processes that hold a KVM VM and audit each.

    One that ends before anything was seen of it is left out: its VM is gone. One that cannot be audited is not.

    Args:
        audit: of one of them; ``audit_process`` with what else is wanted.
    """
    vms, notes = find_vms()
    results: list[AuditResult] = []
    failures: list[NotAudited] = []
    statuses = []
    for vm in vms:
        try:
            results.append(audit(vm))
        except (NoSuchProcess, ProcessEnded):
            continue
        except OracleDisagrees:
            raise  # then nothing that is said of the other VMs is to be relied on either
        except OffmapError as error:
            failures.append(NotAudited(vm.pid, vm.name, vm.facts, str(error)))
            statuses.append(error.exit_status)
    statuses += [result.verdict.exit_status for result in results]
    return EveryVm(
        offmap=offmap.__version__,
        time=utc_now(),
        host=host_facts(),
        exit_status=worst_status(statuses, notes),
        vms=tuple(results),
        not_audited=tuple(failures),
        notes=tuple(notes),
    )
