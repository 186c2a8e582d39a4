"""Evidence is refused for one changed bit, another nonce, another key, another boot and a module that was not there."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from offmap.audit.evidence import tpm
from offmap.audit.evidence.envelope import Sealed, canonical, from_file, payload_of, to_file
from offmap.audit.evidence.keys import signer
from offmap.audit.evidence.seal import seal
from offmap.audit.evidence.statement import Statement
from offmap.audit.evidence.text import render_verification
from offmap.audit.evidence.verify import Expected, Verification, verify
from offmap.audit.verdict import Verdict
from offmap.errors import OffmapError

from ..report.samples import every_vm, exposed, not_audited, vm
from .samples import Keys, Tpm, statement


@dataclasses.dataclass
class Desk:
    """A host that makes evidence, and a verifier that has its keys."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    keys: Keys
    tpm: Tpm

    def make(self, name: str = "evidence", quoted: bool = True, signed: bool = True, **changes: Any) -> Path:
        self.monkeypatch.setattr(tpm, "quote", self.tpm.quote)
        return self.store(statement(self.monkeypatch, **changes), name, quoted, signed)

    def store(self, stated: Statement, name: str = "evidence", quoted: bool = True, signed: bool = True) -> Path:
        path = self.folder / name
        path.write_text(seal(stated, signer(self.keys.private) if signed else None, "0x81" if quoted else None))
        return path

    def check(self, path: Path, **changes: Any) -> Verification:
        known = Expected(self.keys.public, self.tpm.public, "n1")
        return verify(path, dataclasses.replace(known, **changes))

    def policy(self, **expected: Any) -> Path:
        path = self.folder / "policy.json"
        path.write_text(json.dumps({"schema": "offmap-policy/1"} | expected))
        return path


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(tmp_path, monkeypatch, Keys(tmp_path, "key"), Tpm(tmp_path))


def refusals(found: Verification) -> list[str]:
    assert not found.accepted
    assert found.evidence is None and found.verdict is None
    assert render_verification(found).startswith("REFUSED: ")
    return [check.what for check in found.checks if check.result == "refused"]


def test_accepted_and_said_line_by_line(desk: Desk) -> None:
    found = desk.check(desk.make())
    assert found.accepted and found.verdict is Verdict.HIDDEN
    shown = {check.what for check in found.checks if check.result == "shown"}
    assert shown == {"signature", "TPM", "nonce", "report"}
    trusted = {check.what: check.detail for check in found.checks if check.result == "trust"}
    assert {"auditor", "keys", "boot", "TPM's key", "IMA", "modules", "host", "time", "limit"} == set(trusted)
    assert "no IMA policy" in trusted["IMA"]
    text = render_verification(found)
    assert text.startswith("VERIFIED: HIDDEN is stated of VM 169 of host1, 2026-11-22T22:50:26Z\n")


@pytest.mark.parametrize(
    ("key", "tpm_key"),
    [
        (None, lambda: rsa.generate_private_key(65537, 2048)),
        (lambda: ec.generate_private_key(ec.SECP256R1()), None),
        (lambda: ec.generate_private_key(ec.SECP384R1()), None),
    ],
)
def test_kinds_of_keys(desk: Desk, key: Callable[[], Any] | None, tpm_key: Callable[[], Any] | None) -> None:
    desk.keys = Keys(desk.folder, "other", key and key())
    desk.tpm = Tpm(desk.folder, "others", tpm_key and tpm_key())
    assert desk.check(desk.make()).accepted


def test_one_bit_anywhere_in_the_file(desk: Desk) -> None:
    path = desk.make()
    assert desk.check(path).accepted
    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        assert not desk.check(path).accepted, f"byte {at}"
    for at in (0, 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:at])
        assert not desk.check(path).accepted, f"cut at {at}"
    path.write_bytes(content + b"\n")
    assert not desk.check(path).accepted


def test_another_nonce(desk: Desk) -> None:
    assert refusals(desk.check(desk.make(), nonce="n2")) == ["nonce"]
    assert refusals(desk.check(desk.make(nonce=None))) == ["nonce"]
    found = desk.check(desk.make(), nonce=None)
    assert found.accepted
    assert "earlier recording" in render_verification(found)


def test_another_key(desk: Desk) -> None:
    path = desk.make()
    assert refusals(desk.check(path, key=Keys(desk.folder, "other").public)) == ["signature"]
    assert refusals(desk.check(path, tpm_key=Tpm(desk.folder, "other").public)) == ["TPM"]
    rsa_key = rsa.generate_private_key(65537, 2048)
    assert refusals(desk.check(path, tpm_key=Keys(desk.folder, "rsa", rsa_key).public)) == ["TPM"]


def test_what_the_file_carries_is_checked_and_what_is_expected_is_there(desk: Desk) -> None:
    path = desk.make()
    assert refusals(desk.check(path, key=None)) == ["signature"]
    assert refusals(desk.check(path, tpm_key=None)) == ["TPM"]
    sealed = from_file(path.read_bytes())
    path.write_text(to_file(dataclasses.replace(sealed, quote=None)))
    assert refusals(desk.check(path)) == ["TPM"]
    path.write_text(to_file(dataclasses.replace(sealed, signatures={})))
    assert refusals(desk.check(path)) == ["signature"]
    with pytest.raises(OffmapError, match="known beforehand"):
        desk.check(path, key=None, tpm_key=None)


def test_a_quote_or_a_signature_of_another_statement(desk: Desk) -> None:
    one, other = (from_file(desk.make(name, nonce=nonce).read_bytes()) for name, nonce in (("a", "n0"), ("b", "n1")))
    path = desk.folder / "mixed"
    path.write_text(to_file(dataclasses.replace(other, quote=one.quote)))
    assert refusals(desk.check(path)) == ["TPM"]
    path.write_text(to_file(dataclasses.replace(other, signatures=one.signatures)))
    assert refusals(desk.check(path)) == ["signature"]


def test_registers_that_were_not_quoted(desk: Desk) -> None:
    sealed = from_file(desk.make().read_bytes())
    assert sealed.quote is not None
    quote = dataclasses.replace(sealed.quote, pcrs=bytes(len(sealed.quote.pcrs)))
    path = desk.folder / "evidence"
    path.write_text(to_file(dataclasses.replace(sealed, quote=quote)))
    assert refusals(desk.check(path)) == ["form"]


def contradictions(stated: Statement) -> Iterator[Statement]:
    replace = msgspec.structs.replace
    found = stated.predicate
    (one,) = found.vms
    against = ("mapped_pages", "unknown_pages", "not_populated_plain_pages", "excluded_direct_pages", "canaries_found")
    for pages in ({"pages_populated": 0}, *({name: 1} for name in against)):
        yield replace(stated, predicate=replace(found, vms=(replace(one, pages=one.pages | pages),)))
    guessed = replace(one.coverage, sources=("guess",))
    yield replace(stated, predicate=replace(found, vms=(replace(one, coverage=guessed),)))
    yield replace(stated, predicate=replace(found, vms=(replace(one, partial="it ended"),)))
    yield replace(stated, predicate=replace(found, vms=(replace(one, verdict=Verdict.EXPOSED),)))
    yield replace(stated, predicate=replace(found, notes=("there may be more",)))
    yield replace(stated, predicate=replace(found, ended=replace(found.ended, uptime_ms=0)))
    yield replace(stated, predicate_type="urn:another:1")


def test_hidden_that_its_own_figures_contradict(desk: Desk) -> None:
    desk.make()
    for stated in contradictions(statement(desk.monkeypatch)):
        assert refusals(desk.check(desk.store(stated))) == ["form"]


def test_not_hidden_is_stated_as_it_is(desk: Desk) -> None:
    assert desk.check(desk.make(document=exposed())).verdict is Verdict.EXPOSED
    document = every_vm(vm(), not_audited=[not_audited()], exit_status=3)
    found = desk.check(desk.make(document=document))
    assert found.verdict is Verdict.UNKNOWN and found.evidence is not None
    assert found.evidence.every_vm and len(found.evidence.not_audited) == 1


def test_policy(desk: Desk) -> None:
    path = desk.make()
    values = {str(number): value.hex() for number, value in desk.tpm.values.items()}
    modules = {"kvm": "cd" * 20, "old": None, "spare": None}
    good: dict[str, Any] = {
        "verdict": "hidden",
        "host": "host1",
        "kernel": "6.12.0",
        "kernel_build_id": "ab" * 20,
        "command_line": "root=/dev/vda quiet",
        "boot_id": "0e6d3d43-0000-4000-8000-000000000001",
        "taint": 0,
        "lockdown": "integrity",
        "modules": modules,
        "auditor": "12" * 32,
        "max_duration_s": 1,
        "pcrs": values,
        "reset_count": 7,
        "restart_count": 0,
        "every_vm": False,
    }
    found = desk.check(path, policy=desk.policy(**good))
    assert found.accepted
    assert len([check for check in found.checks if check.result == "shown"]) == len(good) + 4
    bad = {
        "verdict": "exposed",
        "host": "host2",
        "kernel": "6.12.1",
        "kernel_build_id": "ac" * 20,
        "command_line": "root=/dev/vda",
        "boot_id": "0e6d3d43-0000-4000-8000-000000000002",
        "taint": 1,
        "lockdown": "none",
        "modules": {"kvm": "cd" * 20},
        "auditor": "13" * 32,
        "max_duration_s": 0,
        "pcrs": values | {"7": "00" * 32},
        "reset_count": 8,
        "restart_count": 1,
        "every_vm": True,
    }
    assert bad.keys() == good.keys()
    for name, value in bad.items():
        assert len(refusals(desk.check(path, policy=desk.policy(**(good | {name: value}))))) == 1, name
    other_build = modules | {"kvm": "ce" * 20}
    assert refusals(desk.check(path, policy=desk.policy(modules=other_build))) == ["modules"]
    assert refusals(desk.check(path, policy=desk.policy(pcrs={"2": "00" * 32}))) == ["PCRs"]


def test_policy_on_a_tpm_and_evidence_without_a_quote(desk: Desk) -> None:
    path = desk.make(quoted=False)
    for policy in ({"pcrs": {"7": "00" * 32}}, {"reset_count": 7}):
        assert len(refusals(desk.check(path, tpm_key=None, policy=desk.policy(**policy)))) == 1


@pytest.mark.parametrize("policy", ['{"schema": "offmap-policy/2"}', "[]", "no JSON"])
def test_no_policy(desk: Desk, policy: str) -> None:
    path = desk.folder / "policy.json"
    path.write_text(policy)
    with pytest.raises(OffmapError, match="is no policy"):
        desk.check(desk.make(), policy=path)


def test_a_word_that_a_policy_does_not_know_is_no_policy(desk: Desk) -> None:
    with pytest.raises(OffmapError, match="is no policy"):
        desk.check(desk.make(), policy=desk.policy(kernal="6.12.0"))


def test_earlier_evidence_as_baseline(desk: Desk) -> None:
    base = desk.make("base", nonce="n0")
    desk.tpm.clock += 1
    desk.tpm.values[10] = bytes(32)  # IMA has measured something since
    assert desk.check(desk.make(), policy=base).accepted
    for changes, expected in (
        ({"boot_id": "0e6d3d43-0000-4000-8000-000000000002"}, "boot"),
        ({"modules": {"kvm": "cd" * 20, "old": None, "evil": "ef" * 20}}, "modules"),
        ({"modules": {"kvm": "ef" * 20}}, "modules"),
        ({"command_line": "quiet"}, "command line"),
        ({"kernel_build_id": None}, "kernel's build ID"),
        ({"livepatches": ("patch",)}, "live patches"),
        ({"taint": 4096}, "taint"),
    ):
        assert refusals(desk.check(desk.make(**changes), policy=base)) == [expected]
    assert desk.check(desk.make(modules={"kvm": "cd" * 20}), policy=base).accepted  # one that has gone


def test_the_boot_counters_of_the_quote(desk: Desk) -> None:
    base = desk.make("base", nonce="n0")
    desk.tpm.resets += 1  # another boot, whatever the host says of its boot ID
    desk.tpm.clock = 0
    assert refusals(desk.check(desk.make(), policy=base)) == ["TPM's resets", "TPM's clock"]
    desk.tpm = Tpm(desk.folder)
    base = desk.make("base", nonce="n0")
    desk.tpm.values[7] = bytes(32)
    assert refusals(desk.check(desk.make(), policy=base)) == ["PCRs"]


def test_a_baseline_is_checked_too(desk: Desk) -> None:
    base = desk.make("base", nonce="n0")
    content = base.read_bytes()
    base.write_bytes(content.replace(b'"sig":"', b'"sig":"A', 1))
    with pytest.raises(OffmapError, match="is no policy"):
        desk.check(desk.make(), policy=base)


def test_no_text_in_it_can_move_a_cursor(desk: Desk) -> None:
    sealed = from_file(desk.make(quoted=False).read_bytes())
    # Whoever has the key can sign any text; it is still shown plainly.
    content = json.loads(sealed.payload)
    content["predicate"]["host"]["name"] = "\x9b2J\u202eevil"
    signed = Sealed(canonical(content))
    signature = signed.envelope().sign(signer(desk.keys.private))
    path = desk.folder / "hostile"
    path.write_text(to_file(Sealed(signed.payload, {signature.keyid: bytes.fromhex(signature.signature)})))
    text = render_verification(desk.check(path, tpm_key=None))
    assert "evil" in text and text.replace("\n", "").isprintable()


def test_the_statement_is_the_same_for_the_same_facts(desk: Desk) -> None:
    assert payload_of(statement(desk.monkeypatch)) == payload_of(statement(desk.monkeypatch))
    assert json.loads(payload_of(statement(desk.monkeypatch)))["_type"] == "https://in-toto.io/Statement/v1"
