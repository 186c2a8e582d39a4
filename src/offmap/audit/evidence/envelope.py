"""The file: a DSSE envelope around the statement, and beside its signatures the TPM's quote.

There is one way only to write given content (canonical JSON, canonical base64, one line), and a file that is written in
another is refused. So no bit of it can change unseen, not even one that no signature covers.
"""

import base64
import binascii
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import msgspec

from offmap.audit.evidence.statement import PAYLOAD_TYPE, PREDICATE, STATEMENT, Statement
from offmap.report.typed import Document, Malformed, decode, parse_json

if TYPE_CHECKING:
    from securesystemslib.dsse import Envelope


class Signature(Document, frozen=True, forbid_unknown_fields=True):
    """A signature of the payload: DSSE's fields."""

    keyid: str
    sig: str


class Quote(Document, frozen=True, forbid_unknown_fields=True):
    """A TPM's quote, all parts in base64.

    Attributes:
        attest: TPMS_ATTEST, as the TPM made it.
        signature: TPMT_SIGNATURE over it.
        pcrs: The values of the quoted registers, in their order.
    """

    attest: str
    signature: str
    pcrs: str


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel", omit_defaults=True):
    payload: str
    payload_type: str
    signatures: tuple[Signature, ...]
    tpm2_quote: Quote | None = None


@dataclass(frozen=True)
class Sealed:
    """Evidence, as it stands in its file.

    Attributes:
        payload: the statement, as canonical JSON.
        signatures: by the identifier of the key.
        quote: the TPM's quote; None if there is none.
    """

    payload: bytes
    signatures: dict[str, bytes] = field(default_factory=dict)
    quote: "RawQuote | None" = None

    def envelope(self) -> "Envelope":
        """As securesystemslib signs and verifies it."""
        from securesystemslib.dsse import Envelope
        from securesystemslib.signer import Signature as Signed

        signatures = {keyid: Signed(keyid, value.hex()) for keyid, value in self.signatures.items()}
        return Envelope(self.payload, PAYLOAD_TYPE, signatures)

    def pae(self) -> bytes:
        """What is signed: DSSE's pre-authentication encoding. The quote holds its SHA-256."""
        return self.envelope().pae()

    def statement(self) -> Statement:
        """The statement. Raises Malformed: it is none of this form."""
        parsed = parse_json(self.payload)
        if canonical(parsed) != self.payload:
            raise Malformed("its statement is not canonical JSON")
        statement = decode(Statement, parsed)
        if (statement.type, statement.predicate_type) != (STATEMENT, PREDICATE):
            raise Malformed(f"it states {statement.predicate_type[:80]!r}, not {PREDICATE}")
        return statement


@dataclass(frozen=True)
class RawQuote:
    """A TPM's quote, as the TPM made it: see Quote."""

    attest: bytes
    signature: bytes
    pcrs: bytes


def canonical(value: object) -> bytes:
    """The one way to write this JSON value. Raises Malformed: it has none, like a fraction."""
    from securesystemslib.exceptions import FormatError
    from securesystemslib.formats import encode_canonical

    try:
        # Its parameter is any JSON value without fractions; what else comes, it refuses.
        return cast(str, encode_canonical(value)).encode()  # type: ignore[arg-type]
    except FormatError as error:
        raise Malformed(f"has no canonical form: {error}") from None


def payload_of(statement: Statement) -> bytes:
    """The bytes to sign."""
    return canonical(statement.to_json())


def to_file(sealed: Sealed) -> str:
    """What the file holds."""
    quote = sealed.quote
    content = _File(
        payload=_text(sealed.payload),
        payload_type=PAYLOAD_TYPE,
        signatures=tuple(Signature(keyid, _text(sealed.signatures[keyid])) for keyid in sorted(sealed.signatures)),
        tpm2_quote=None if quote is None else Quote(*map(_text, (quote.attest, quote.signature, quote.pcrs))),
    )
    return canonical(msgspec.to_builtins(content)).decode() + "\n"


def from_file(content: bytes) -> Sealed:
    """Read a file. No signature is checked here. Raises Malformed: it is no evidence, or not written in the one way."""
    found = decode(_File, parse_json(content))
    quote = found.tpm2_quote
    sealed = Sealed(
        _bytes(found.payload),
        {each.keyid: _bytes(each.sig) for each in found.signatures},
        None if quote is None else RawQuote(*map(_bytes, (quote.attest, quote.signature, quote.pcrs))),
    )
    if found.payload_type != PAYLOAD_TYPE:
        raise Malformed(f"its payload is {found.payload_type[:80]!r}, not {PAYLOAD_TYPE}")
    if to_file(sealed).encode() != content:
        raise Malformed("it is not written as offmap writes it: something in it has changed")
    return sealed


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Malformed("it holds something that is no base64") from None
