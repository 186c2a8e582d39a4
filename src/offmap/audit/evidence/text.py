"""A verification as text: the answer first, then line by line what it rests on."""

from offmap.audit.evidence.statement import Predicate
from offmap.audit.evidence.verify import REFUSED, SHOWN, TRUST, Verification

_WORDS = {SHOWN: "shown", REFUSED: "REFUSED", TRUST: "trust"}
_WIDTH = max(map(len, _WORDS.values()))


def render_verification(verification: Verification) -> str:
    """All of it, for people."""
    lines = [_answer(verification)]
    if verification.evidence is not None:
        lines += _stated(verification.evidence)
    order = (REFUSED, SHOWN, TRUST)
    for result in order:
        lines += [
            f"  {_WORDS[result]:<{_WIDTH}}  {check.what}: {check.detail}"
            for check in verification.checks
            if check.result == result
        ]
    return "\n".join(lines)


def _answer(verification: Verification) -> str:
    if verification.evidence is None:
        return f"REFUSED: {verification.file} shows nothing"
    found = verification.evidence
    verdict = found.verdict.value.upper() if found.verdict else "NO VM"
    which = "all VMs" if found.every_vm else f"VM {found.vms[0].pid}" if found.vms else "no VM"
    return f"VERIFIED: {verdict} is stated of {which} of {found.host.name}, {found.ended.time}"


def _stated(found: Predicate) -> list[str]:
    lines = [
        f"  stated   VM {vm.pid} ({vm.process}): {vm.verdict.value}, {vm.pages.get('mapped_pages', 0):,} of "
        f"{vm.pages.get('pages_populated', 0):,} pages mapped, {vm.pages.get('unknown_pages', 0):,} unknown; "
        f"{vm.coverage.walks} walks in {vm.coverage.stretch_ms / 1000:.1f} s"
        for vm in found.vms
    ]
    lines += [f"  stated   VM {vm.pid} ({vm.process}): not audited: {vm.reason}" for vm in found.not_audited]
    lines += [f"  stated   note: {note}" for vm in found.vms for note in vm.notes]
    lines += [f"  stated   note: {note}" for note in found.notes]
    host = found.host
    lines.append(
        f"  stated   kernel {host.kernel} (build ID {host.kernel_build_id or 'none'}), boot {host.boot_id}, "
        f"taint {host.taint}, {len(host.modules)} modules"
    )
    return lines
