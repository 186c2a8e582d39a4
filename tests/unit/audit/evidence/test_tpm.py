"""Quotes are read strictly, and what tpm2-tools say is passed on."""

import dataclasses
from pathlib import Path

import pytest

from offmap.audit.evidence import tpm
from offmap.audit.evidence.quote import decode_quote, signed_by
from offmap.errors import OffmapError
from offmap.report.typed import Malformed

from .samples import PCRS, Tpm


def test_quote(tmp_path: Path) -> None:
    device = Tpm(tmp_path)
    raw = device.quote("", b"q" * 32)
    quoted = decode_quote(raw)
    assert (quoted.qualifying, quoted.reset_count, quoted.clock_ms, quoted.safe) == (b"q" * 32, 7, 1000, True)
    assert quoted.pcrs == {number: device.values[number].hex() for number in PCRS}
    assert signed_by(raw, device.key.public_key())


def test_each_length_of_a_quote_but_its_own_is_refused(tmp_path: Path) -> None:
    device = Tpm(tmp_path)
    raw = device.quote("", b"q" * 32)
    for attest in (*(raw.attest[:size] for size in range(len(raw.attest))), raw.attest + b"\0"):
        with pytest.raises(Malformed):
            decode_quote(dataclasses.replace(raw, attest=attest))
    for signature in (*(raw.signature[:size] for size in range(len(raw.signature))), raw.signature + b"\0"):
        with pytest.raises(Malformed):
            signed_by(dataclasses.replace(raw, signature=signature), device.key.public_key())


def tool(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "tpm2_quote"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_without_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OffmapError, match="there is no tpm2_quote here; install tpm2-tools"):
        tpm.quote("0x81", bytes(32))


def test_what_the_tool_says_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool(tmp_path, "echo 'ERROR: no TPM' >&2; echo 'ERROR: more' >&2; exit 1", monkeypatch)
    with pytest.raises(OffmapError, match=r"^the TPM gave no quote: ERROR: no TPM; check") as caught:
        tpm.quote("0x81", bytes(32))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["", "--help"])
def test_no_key(key: str) -> None:
    with pytest.raises(OffmapError, match="is no key of a TPM"):
        tpm.quote(key, bytes(32))


def test_its_files_are_the_quote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = 'while [ $# -gt 0 ]; do case $1 in -m|-s|-o) printf %s "$1" > "$2";; esac; shift; done'
    tool(tmp_path, script, monkeypatch)
    raw = tpm.quote("0x81", bytes(32))
    assert (raw.attest, raw.signature, raw.pcrs) == (b"-m", b"-s", b"-o")
