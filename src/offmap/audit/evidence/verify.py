"""Check evidence: what is shown by it, and what must still be trusted."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

from offmap.audit.evidence.envelope import Sealed, from_file
from offmap.audit.evidence.keys import public_key, verifying_key
from offmap.audit.evidence.policy import (
    Compared,
    Policy,
    against_baseline,
    against_policy,
    check_times,
    parse_policy,
)
from offmap.audit.evidence.quote import Quoted, decode_quote, signed_by
from offmap.audit.evidence.statement import Predicate, Statement
from offmap.audit.evidence.trust import to_trust
from offmap.audit.host import Time, utc_now
from offmap.audit.result import Source
from offmap.audit.verdict import Verdict, worst
from offmap.errors import KernelError, OffmapError
from offmap.report.typed import Document, Malformed, one_of, parse_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
    from securesystemslib.signer import SSlibKey

SHOWN, REFUSED, TRUST = "shown", "refused", "trust"

_AGAINST = ("mapped_pages", "unknown_pages", "not_populated_plain_pages", "excluded_direct_pages", "canaries_found")
"""Counts of a VM that are 0 if it is hidden."""


class Check(Document, frozen=True):
    """One line of a verification.

    Attributes:
        result: shown; refused (one of these refuses the whole); trust (it must be believed).
        what: It is about.
        detail: What was found.
    """

    result: Annotated[str, one_of((SHOWN, REFUSED, TRUST))]
    what: str
    detail: str


class Verification(Document, frozen=True, tag_field="schema", tag="offmap-verification/1"):
    """What offmap audit --verify FILE --json prints.

    Attributes:
        schema: Name and version of this form.
        time: When it was checked, in UTC.
        file: Name of the evidence's file.
        accepted: Whether nothing was refused. If not, the rest of the evidence says nothing.
        verdict: What the evidence states; null if it is refused, or if there was no VM.
        checks: Line by line.
        evidence: What the evidence states; null if it is refused.
    """

    time: Time
    file: str
    accepted: bool
    verdict: Verdict | None
    checks: tuple[Check, ...]
    evidence: Predicate | None


DOCUMENTS = (Verification, Policy, Statement)
"""What there is of evidence as JSON: their schema is published."""


@dataclass(frozen=True)
class Expected:
    """What the verifier knows beforehand. None, where nothing is known.

    Attributes:
        key: file with the public key that signed.
        tpm_key: file with the public key of the TPM.
        nonce: what the host was asked to state.
        policy: file with a policy or an earlier evidence.
    """

    key: Path | None = None
    tpm_key: Path | None = None
    nonce: str | None = None
    policy: Path | None = None


@dataclass(frozen=True)
class _Keys:
    """The keys that are expected, read from their files."""

    key: "SSlibKey | None"
    tpm: "PublicKeyTypes | None"

    @classmethod
    def of(cls, expected: Expected) -> Self:
        key = None if expected.key is None else verifying_key(expected.key)
        return cls(key, None if expected.tpm_key is None else public_key(expected.tpm_key))


@dataclass(frozen=True)
class _Opened:
    """Evidence whose signatures have been looked at."""

    checks: tuple[Check, ...]
    found: Predicate
    quoted: Quoted | None
    digest: str

    @property
    def refused(self) -> bool:
        return any(check.result == REFUSED for check in self.checks)


def verify(path: Path, expected: Expected) -> Verification:
    """Check the evidence in this file.

    Raises:
        KernelError: a file cannot be read.
        OffmapError: a key or a policy cannot be used, or there is no key to check with.
    """
    if expected.key is None and expected.tpm_key is None:
        raise OffmapError(
            "evidence is checked by a key that is known beforehand",
            "give its public key: --evidence-key FILE, or --tpm FILE for a TPM's quote",
        )
    keys = _Keys.of(expected)
    content = _content(path)
    try:
        opened = _open(content, keys)
        checks = [*opened.checks, _nonce(opened.found, expected.nonce)]
        if expected.policy is not None:
            checks += _policy(expected.policy, keys, opened)
    except Malformed as error:
        return Verification(utc_now(), str(path), False, None, (Check(REFUSED, "form", str(error)),), None)
    if any(check.result == REFUSED for check in checks):
        return Verification(utc_now(), str(path), False, None, tuple(checks), None)
    found = opened.found
    checks.append(Check(SHOWN, "report", f"the whole result has SHA-256 {opened.digest}"))
    trusted = to_trust(found, opened.quoted, expected.nonce is not None, expected.policy is not None)
    checks += [Check(TRUST, what, detail) for what, detail in trusted]
    return Verification(utc_now(), str(path), True, found.verdict, tuple(checks), found)


def _open(content: bytes, keys: _Keys) -> _Opened:
    sealed = from_file(content)
    statement = sealed.statement()
    checks = [_signature(sealed, keys.key)]
    quoted, about_quote = _quote(sealed, keys.tpm)
    checks += about_quote
    _check_figures(statement.predicate)
    digest = next((subject.digest.get("sha256", "") for subject in statement.subject), "")
    return _Opened(tuple(checks), statement.predicate, quoted, digest)


def _signature(sealed: Sealed, key: "SSlibKey | None") -> Check:
    """Whatever the file carries is checked: a signature that nobody checks could be anything."""
    from securesystemslib.exceptions import VerificationError

    what = "signature"
    if key is None:
        if sealed.signatures:
            return Check(
                REFUSED, what, "it is signed with a key file, and no key was given to check it (--evidence-key)"
            )
        return Check(SHOWN, what, "none by a key file, as expected")
    if set(sealed.signatures) != {key.keyid}:
        by = ", ".join(keyid[:16] for keyid in sealed.signatures) or "nobody"
        return Check(REFUSED, what, f"it is signed by {by}, not by the key {key.keyid[:16]}")
    try:
        sealed.envelope().verify([key], 1)
    except VerificationError:
        return Check(REFUSED, what, f"it is not a signature of this content by the key {key.keyid[:16]}")
    return Check(SHOWN, what, f"of the whole statement, by the key {key.keyid[:16]}")


def _quote(sealed: Sealed, key: "PublicKeyTypes | None") -> tuple[Quoted | None, list[Check]]:
    what = "TPM"
    raw = sealed.quote
    if key is None:
        if raw is None:
            return None, []
        return None, [Check(REFUSED, what, "it has a quote, and no key was given to check it (--tpm)")]
    if raw is None:
        return None, [Check(REFUSED, what, "it has no quote of a TPM")]
    if not signed_by(raw, key):
        return None, [Check(REFUSED, what, "its quote was not signed by the key that is expected")]
    quoted = decode_quote(raw)
    if quoted.qualifying != hashlib.sha256(sealed.pae()).digest():
        return None, [Check(REFUSED, what, "its quote is of another statement")]
    registers = ", ".join(map(str, quoted.pcrs))
    boots = f"reset {quoted.reset_count} times, restarted {quoted.restart_count} times since"
    return quoted, [Check(SHOWN, what, f"quoted this statement with registers {registers}; {boots}")]


def _nonce(found: Predicate, expected: str | None) -> Check:
    if expected is None:
        return Check(TRUST, "nonce", "none is expected, so that this may be an earlier recording")
    if found.nonce != expected:
        return Check(REFUSED, "nonce", f"it is {found.nonce or 'missing'}, not {expected}")
    return Check(SHOWN, "nonce", "it is the expected one: this was made after it was given")


def _policy(path: Path, keys: _Keys, opened: _Opened) -> Iterator[Check]:
    content = _content(path)
    try:
        value = parse_json(content)
        if isinstance(value, dict) and "payload" in value:
            base = _open(content, keys)
            if base.refused:
                why = next(check for check in base.checks if check.result == REFUSED)
                raise Malformed(f"is refused itself: {why.what}: {why.detail}")
            compared: Iterator[Compared] = against_baseline(base.found, opened.found, base.quoted, opened.quoted)
        else:
            policy: Policy = parse_policy(value)
            compared = against_policy(policy, opened.found, opened.quoted)
    except Malformed as error:
        raise OffmapError(
            f"{path} is no policy", "give an offmap-policy/1 file or an earlier evidence", why=str(error)
        ) from None
    for each in compared:
        yield Check(SHOWN if each.met else REFUSED, each.what, each.detail)


def _check_figures(found: Predicate) -> None:
    """Make sure that the evidence does not contradict itself. Raises Malformed: it does."""
    check_times(found)
    verdicts = [vm.verdict for vm in found.vms]
    doubtful = [Verdict.UNKNOWN] * (len(found.not_audited) + bool(found.notes))
    if worst([*verdicts, *doubtful]) is not found.verdict:
        raise Malformed("its verdict is not that of its VMs")
    for vm in found.vms:
        against = (
            *(vm.pages.get(count) for count in _AGAINST),
            vm.coverage.unreadable_bytes,
            vm.partial,
            Source.GUESS in vm.coverage.sources,
        )
        if vm.verdict is Verdict.HIDDEN and (any(against) or not vm.pages.get("pages_populated")):
            raise Malformed(f"it says that VM {vm.pid} is hidden, and its figures do not")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise KernelError(f"reading {path}", error, "name a file that offmap audit --evidence made") from None
