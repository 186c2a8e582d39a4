"""What is expected of a host: a policy that somebody wrote, or an earlier evidence of it as the baseline."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Literal

from msgspec import Meta

from offmap.audit.evidence.quote import Quoted
from offmap.audit.evidence.statement import Predicate
from offmap.audit.host import parse_time
from offmap.report.typed import Count, Document, Malformed, decode

_Hex = Annotated[str, Meta(pattern="^[0-9a-f]+$")]
_Register = Annotated[str, Meta(pattern="^(0|[1-9]|1[0-9]|2[0-3])$")]


class Policy(
    Document, frozen=True, forbid_unknown_fields=True, tag_field="schema", tag="offmap-policy/1", kw_only=True
):
    """What evidence must say: the file for offmap audit --verify FILE --policy POLICY.

    What is left out, or null, may be anything.

    Attributes:
        schema: Name and version of this form.
        verdict: Of all VMs together: hidden, exposed or unknown.
        every_vm: Whether all VMs of the host must have been asked for.
        host: Name of the host.
        kernel: Release.
        kernel_build_id: Of the kernel image.
        command_line: Of the kernel.
        boot_id: Of the host's boot.
        taint: Of the kernel.
        lockdown: Level that must be in force.
        modules: Every module that may be loaded, with its build ID.
        auditor: Digest of offmap's files.
        max_duration_s: Seconds between the beginning and the end of the audit.
        pcrs: Values of the TPM's registers (SHA-256), by number.
        reset_count: Resets of the TPM: one more at each boot.
        restart_count: Restarts of the TPM since.
    """

    verdict: Literal["hidden", "exposed", "unknown"] | None = None
    every_vm: bool | None = None
    host: str | None = None
    kernel: str | None = None
    kernel_build_id: _Hex | None = None
    command_line: str | None = None
    boot_id: str | None = None
    taint: Count | None = None
    lockdown: Literal["none", "integrity", "confidentiality"] | None = None
    modules: dict[str, _Hex | None] | None = None
    auditor: _Hex | None = None
    max_duration_s: Count | None = None
    pcrs: dict[_Register, _Hex] | None = None
    reset_count: Count | None = None
    restart_count: Count | None = None


@dataclass(frozen=True)
class Compared:
    """One thing that was expected.

    Attributes:
        what: it is about.
        met: whether it is so.
        detail: what was found, and if it is not met what was expected.
    """

    what: str
    met: bool
    detail: str


def parse_policy(value: object) -> Policy:
    """The policy in this JSON value. Raises Malformed: it is none."""
    if not isinstance(value, dict) or value.get("schema") != "offmap-policy/1":
        raise Malformed('it has no "schema": "offmap-policy/1"')
    return decode(Policy, value)


def against_policy(policy: Policy, found: Predicate, quoted: Quoted | None) -> Iterator[Compared]:
    """Compare evidence with a policy: one result for each thing that it names."""
    host = found.host
    figures = (
        ("verdict", policy.verdict, found.verdict.value if found.verdict else "no VM"),
        ("every VM", policy.every_vm, found.every_vm),
        ("host", policy.host, host.name),
        ("kernel", policy.kernel, host.kernel),
        ("kernel's build ID", policy.kernel_build_id, host.kernel_build_id),
        ("command line", policy.command_line, host.command_line),
        ("boot", policy.boot_id, host.boot_id),
        ("taint", policy.taint, host.taint),
        ("lockdown", policy.lockdown, host.lockdown),
        ("auditor", policy.auditor, found.auditor.digest),
        ("TPM's resets", policy.reset_count, quoted and quoted.reset_count),
        ("TPM's restarts", policy.restart_count, quoted and quoted.restart_count),
    )
    for what, expected, value in figures:
        if expected is not None:
            yield _equal(what, expected, value)
    if policy.modules is not None:
        yield _modules(policy.modules, host.modules)
    if policy.max_duration_s is not None:
        seconds = (found.ended.uptime_ms - found.began.uptime_ms) / 1000
        yield Compared("duration", 0 <= seconds <= policy.max_duration_s, f"{seconds:.1f} s")
    yield from _registers(policy.pcrs or {}, quoted)


def against_baseline(
    base: Predicate, found: Predicate, base_quote: Quoted | None, quoted: Quoted | None
) -> Iterator[Compared]:
    """Compare evidence with an earlier one of the same boot of the same host."""
    before, now = base.host, found.host
    yield _equal("host", before.name, now.name)
    yield _equal("kernel's build ID", before.kernel_build_id, now.kernel_build_id)
    yield _equal("command line", before.command_line, now.command_line)
    yield _equal("boot", before.boot_id, now.boot_id)
    yield _equal("taint", before.taint, now.taint)
    yield _equal("lockdown", before.lockdown, now.lockdown)
    yield _modules(before.modules, now.modules)
    yield _equal("live patches", before.livepatches, now.livepatches)
    yield _equal("auditor", base.auditor.digest, found.auditor.digest)
    later = timedelta(milliseconds=found.ended.uptime_ms - base.ended.uptime_ms)
    yield Compared("order", later >= timedelta(), f"made {later} after the baseline, by the host's uptime")
    if base_quote is None:
        return
    yield _equal("TPM's resets", base_quote.reset_count, quoted and quoted.reset_count)
    clock = -1 if quoted is None else quoted.clock_ms
    yield Compared("TPM's clock", clock >= base_quote.clock_ms, f"{clock} ms, in the baseline {base_quote.clock_ms} ms")
    # IMA extends its register with each program, so that an equal value is not to be expected.
    steady = {str(number): value for number, value in base_quote.pcrs.items() if number != _IMA_REGISTER}
    yield from _registers(steady, quoted)


_IMA_REGISTER = 10


def check_times(found: Predicate) -> None:
    """Make sure that the evidence's own times are possible.

    Raises:
        Malformed: it ended before it began, or they are no times.
    """
    began, ended = parse_time(found.began.time), parse_time(found.ended.time)
    if found.ended.uptime_ms < found.began.uptime_ms:
        raise Malformed(f"it says that it began at {began} and ended before, at {ended}")


def _equal(what: str, expected: object, value: object) -> Compared:
    met = expected == value
    shown = f"{value}" if met else f"it is {value}, not {expected}"
    return Compared(what, met, shown)


def _modules(expected: dict[str, str | None], loaded: dict[str, str | None]) -> Compared:
    wrong = [
        f"{name} was not there" if name not in expected else f"{name} is another build"
        for name, build in loaded.items()
        if name not in expected or expected[name] != build
    ]
    gone = len(expected.keys() - loaded.keys())
    return Compared(
        "modules", not wrong, "; ".join(wrong) or f"{len(loaded)} loaded, each as expected ({gone} not loaded)"
    )


def _registers(expected: dict[str, str], quoted: Quoted | None) -> Iterator[Compared]:
    if not expected:
        return
    if quoted is None:
        yield Compared("PCRs", False, "the evidence has no quote of a TPM")
        return
    wrong = [number for number, value in expected.items() if quoted.pcrs.get(int(number)) != value]
    yield Compared(
        "PCRs", not wrong, f"{', '.join(wrong)} differ" if wrong else f"{', '.join(expected)} are as expected"
    )
