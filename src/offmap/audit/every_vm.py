"""An audit of every VM on a host: one result each, or why there is none, and the worst of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import offmap
from offmap.audit.audit import AuditResult
from offmap.audit.host import HostFacts, host_facts, utc_now
from offmap.audit.oracle import OracleDisagrees
from offmap.audit.process import NoSuchProcess, ProcessEnded
from offmap.audit.reach import VmmFacts
from offmap.audit.verdict import Verdict
from offmap.audit.vms import VmProcess, find_vms
from offmap.errors import ExitStatus, OffmapError

__all__ = ["EveryVm", "NotAudited", "audit_every_vm"]

SCHEMA = "offmap-audit-all/1"
_GRAVITY = (ExitStatus.DONE, ExitStatus.FAILED, ExitStatus.UNDETERMINED, ExitStatus.EXPOSED)


@dataclass(frozen=True)
class NotAudited:
    """A process that holds a KVM VM and could not be audited, and why; its VM is unknown, never left out."""

    pid: int
    process: str
    vmm: VmmFacts
    reason: str
    exit_status: ExitStatus = ExitStatus.UNDETERMINED

    def to_json(self) -> dict[str, Any]:
        return {
            "pid": self.pid,
            "process": self.process,
            "vmm": self.vmm.to_json(),
            "verdict": Verdict.UNKNOWN.value,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class EveryVm:
    """All VMs of a host, in order of their PIDs.

    ``not_judged`` are reasons why there may be more VMs than were found: processes whose descriptors cannot be read.
    """

    host: HostFacts
    results: tuple[AuditResult, ...]
    failures: tuple[NotAudited, ...] = ()
    not_judged: tuple[str, ...] = ()
    time: str = field(default_factory=utc_now)

    @property
    def exit_status(self) -> ExitStatus:
        """The worst: exposed before undetermined before failed before hidden. No VM at all is nothing exposed."""
        found = [result.verdict.exit_status for result in self.results] + [each.exit_status for each in self.failures]
        if self.not_judged:
            found.append(ExitStatus.UNDETERMINED)
        return max(found, key=_GRAVITY.index, default=ExitStatus.DONE)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "offmap": offmap.__version__,
            "time": self.time,
            "host": self.host.to_json(),
            "exit_status": int(self.exit_status),
            "vms": [result.to_json() for result in self.results],
            "not_audited": [each.to_json() for each in self.failures],
            "notes": list(self.not_judged),
        }


def audit_every_vm(audit: Callable[[VmProcess], AuditResult]) -> EveryVm:
    """Find all processes that hold a KVM VM and audit each.

    One that ends before anything was seen of it is left out: its VM is gone. One that cannot be audited is not.

    Args:
        audit: of one of them; ``audit_process`` with what else is wanted.
    """
    vms, notes = find_vms()
    results, failures = [], []
    for vm in vms:
        try:
            results.append(audit(vm))
        except (NoSuchProcess, ProcessEnded):
            continue
        except OracleDisagrees:
            raise  # then nothing that is said of the other VMs is to be relied on either
        except OffmapError as error:
            failures.append(NotAudited(vm.pid, vm.name, vm.facts, str(error), error.exit_status))
    return EveryVm(host_facts(), tuple(results), tuple(failures), tuple(notes))
