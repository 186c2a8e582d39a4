"""Evidence for tests, made as the product makes it, and a TPM whose key is known."""

import hashlib
import struct
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from offmap.audit.evidence.envelope import RawQuote
from offmap.audit.evidence.statement import Auditor, Host, Moment, Statement
from offmap.audit.report.hosts import parse_report

from ..report.samples import vm

PCRS = (0, 1, 7, 10, 14)


class Keys:
    """A pair of key files."""

    def __init__(self, folder: Path, name: str, key: Any = None) -> None:
        self.key: Any = key or Ed25519PrivateKey.generate()
        self.private, self.public = folder / f"{name}.pem", folder / f"{name}.pub"
        self.private.write_bytes(self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        public = self.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        self.public.write_bytes(public)


class Tpm(Keys):
    """What quotes as a TPM does: `quote` takes the place of ``tpm.quote``."""

    def __init__(self, folder: Path, name: str = "tpm", key: Any = None) -> None:
        super().__init__(folder, name, key or ec.generate_private_key(ec.SECP256R1()))
        self.resets, self.restarts, self.clock = 7, 0, 1000
        self.values = {number: hashlib.sha256(bytes([number])).digest() for number in PCRS}

    def quote(self, _key: str, qualifying: bytes) -> RawQuote:
        values = b"".join(self.values.values())
        mask = sum(1 << number for number in self.values).to_bytes(3, "little")
        parts = [
            struct.pack(">IH", 0xFF544347, 0x8018),
            struct.pack(">H4s", 4, b"name"),
            struct.pack(">H", len(qualifying)) + qualifying,
            struct.pack(">QIIBQ", self.clock, self.resets, self.restarts, 1, 42),
            struct.pack(">IHB", 1, 0x000B, 3) + mask,
            struct.pack(">H", 32) + hashlib.sha256(values).digest(),
        ]
        attest = b"".join(parts)
        return RawQuote(attest, self._sign(attest), values)

    def _sign(self, attest: bytes) -> bytes:
        if isinstance(self.key, rsa.RSAPrivateKey):
            signature = self.key.sign(attest, padding.PKCS1v15(), hashes.SHA256())
            return struct.pack(">HHH", 0x0014, 0x000B, len(signature)) + signature
        r, s = decode_dss_signature(self.key.sign(attest, ec.ECDSA(hashes.SHA256())))
        return struct.pack(">HH", 0x0018, 0x000B) + b"".join(
            struct.pack(">H", 32) + part.to_bytes(32, "big") for part in (r, s)
        )


def host(**changes: Any) -> Host:
    facts: dict[str, Any] = {
        "name": "host1",
        "kernel": "6.12.0",
        "kernel_build_id": "ab" * 20,
        "boot_id": "0e6d3d43-0000-4000-8000-000000000001",
        "command_line": "root=/dev/vda quiet",
        "taint": 0,
        "lockdown": "integrity",
        "modules": {"kvm": "cd" * 20, "old": None},
        "livepatches": (),
        "ima": "boot only",
        "ima_measurements": 1,
    }
    return Host(**(facts | changes))


AUDITOR = Auditor("0.1.0", "12" * 32, "3.11.7", "34" * 32, {"numpy": "2.4.6"})


def statement(monkeypatch: Any, nonce: str | None = "n1", document: Any = None, **changes: Any) -> Statement:
    """Of a VM that is hidden, unless another document is given; `changes` are of the host."""
    from offmap.audit.evidence import make

    monkeypatch.setattr(make, "host", lambda: host(**changes))
    monkeypatch.setattr(make, "auditor", lambda: AUDITOR)
    monkeypatch.setattr(make, "moment", lambda: Moment("2026-11-22T22:50:26Z", 61_000))
    return make.make_statement(parse_report(document or vm()), nonce, Moment("2026-11-22T22:50:25Z", 60_000))
