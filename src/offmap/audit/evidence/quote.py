"""What a TPM's quote says, and whether its key signed it.

Structures of the TPM 2.0 Library, Part 2: TPMS_ATTEST (10.12.12), TPMS_QUOTE_INFO (10.12.4), TPMT_SIGNATURE (11.3.4).
All are big-endian, and nothing may stand behind them.
"""

import hashlib
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offmap.audit.evidence.envelope import RawQuote
from offmap.report.typed import Malformed

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

TPM_GENERATED_VALUE = 0xFF544347
TPM_ST_ATTEST_QUOTE = 0x8018
TPM_ALG_SHA256 = 0x000B
TPM_ALG_RSASSA = 0x0014
TPM_ALG_RSAPSS = 0x0016
TPM_ALG_ECDSA = 0x0018


@dataclass(frozen=True)
class Quoted:
    """What the TPM signed.

    Attributes:
        qualifying: what it was given to sign with the rest (extraData).
        clock_ms: milliseconds that the TPM has run since it was last cleared.
        reset_count: how often it was reset: one more at each boot of the host.
        restart_count: how often it was restarted or resumed since.
        safe: whether the clock cannot have gone back.
        pcrs: register values in hexadecimal, by number (SHA-256).
    """

    qualifying: bytes
    clock_ms: int
    reset_count: int
    restart_count: int
    safe: bool
    pcrs: dict[int, str]


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        if self._at + count > len(self._data):
            raise Malformed("its quote ends too early")
        self._at += count
        return self._data[self._at - count : self._at]

    def unpack(self, form: str) -> tuple[int, ...]:
        return struct.unpack(">" + form, self.take(struct.calcsize(">" + form)))

    def sized(self) -> bytes:
        """TPM2B: two bytes of size, then so many."""
        return self.take(self.unpack("H")[0])

    def end(self) -> None:
        if self._at != len(self._data):
            raise Malformed("something stands behind its quote")


def decode_quote(raw: RawQuote) -> Quoted:
    """Read it. The register values are checked against the digest that was signed; the signature is not.

    Raises:
        Malformed: it is no quote, or the values are not those that were quoted.
    """
    reader = _Reader(raw.attest)
    if reader.unpack("IH") != (TPM_GENERATED_VALUE, TPM_ST_ATTEST_QUOTE):
        raise Malformed("what it holds as a quote was not made by a TPM, or is none")
    reader.sized()  # qualifiedSigner: the name of the key and its parents; the signature says which key it was
    qualifying = reader.sized()
    clock, resets, restarts, safe = reader.unpack("QIIB")
    reader.unpack("Q")  # firmwareVersion
    numbers = _selection(reader)
    digest = reader.sized()
    reader.end()
    size = hashlib.sha256().digest_size
    if len(raw.pcrs) != size * len(numbers) or hashlib.sha256(raw.pcrs).digest() != digest:
        raise Malformed("the register values are not those that the TPM quoted")
    values = {number: raw.pcrs[at * size :][:size].hex() for at, number in enumerate(numbers)}
    return Quoted(qualifying, clock, resets, restarts, bool(safe), values)


def _selection(reader: _Reader) -> list[int]:
    """TPML_PCR_SELECTION of one bank: the registers' numbers, in order."""
    count, algorithm, size = reader.unpack("IHB")
    if (count, algorithm) != (1, TPM_ALG_SHA256):
        raise Malformed("its quote is not of the SHA-256 registers")
    bits = int.from_bytes(reader.take(size), "little")
    return [number for number in range(size * 8) if bits >> number & 1]


def signed_by(raw: RawQuote, key: "PublicKeyTypes") -> bool:
    """Say whether this key signed the quote. Raises Malformed: the signature is none that a TPM makes for evidence."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
    from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
    from cryptography.hazmat.primitives.hashes import SHA256

    reader = _Reader(raw.signature)
    scheme, digest = reader.unpack("HH")
    if digest != TPM_ALG_SHA256:
        raise Malformed("its quote is not signed with SHA-256")
    parts = [reader.sized() for _ in range(2 if scheme == TPM_ALG_ECDSA else 1)]
    reader.end()
    try:
        if scheme == TPM_ALG_ECDSA and isinstance(key, ec.EllipticCurvePublicKey):
            r, s = (int.from_bytes(part, "big") for part in parts)
            key.verify(encode_dss_signature(r, s), raw.attest, ec.ECDSA(SHA256()))
        elif scheme == TPM_ALG_RSASSA and isinstance(key, rsa.RSAPublicKey):
            key.verify(parts[0], raw.attest, padding.PKCS1v15(), SHA256())
        elif scheme == TPM_ALG_RSAPSS and isinstance(key, rsa.RSAPublicKey):
            pss = padding.PSS(padding.MGF1(SHA256()), padding.PSS.AUTO)
            key.verify(parts[0], raw.attest, pss, SHA256())
        else:
            return False
    except InvalidSignature:
        return False
    return True
