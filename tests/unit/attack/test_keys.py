"""Private keys are recognised in memory, in PEM and as a prime, and no other key is taken for one."""

import base64
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from offmap.attack.keys import PublicKey
from offmap.errors import OffmapError

Private = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


@pytest.fixture(scope="module")
def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def public(key: Private, path: Path, ssh: bool = False) -> PublicKey:
    encoding = serialization.Encoding.OpenSSH if ssh else serialization.Encoding.PEM
    form = serialization.PublicFormat.OpenSSH if ssh else serialization.PublicFormat.SubjectPublicKeyInfo
    path.write_bytes(key.public_key().public_bytes(encoding, form))
    return PublicKey(path)


def pem(key: Private, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def test_a_prime_in_memory_gives_the_key(rsa_key: rsa.RSAPrivateKey, tmp_path: Path) -> None:
    wanted = public(rsa_key, tmp_path / "key")
    prime = rsa_key.private_numbers().p.to_bytes(128, "little")
    assert wanted.prime_in(b"\xff" * 800 + prime + b"\xff" * 80) == 800
    # Not at an address that is no multiple of eight, where no big number is.
    assert wanted.prime_in(b"\xff" * 804 + prime) == -1
    assert wanted.prime_in(prime[:-8]) == wanted.prime_in(b"") == -1
    other = rsa.generate_private_key(65537, 2048).private_numbers().p.to_bytes(128, "little")
    assert wanted.prime_in(other) == -1


def test_a_small_prime_is_recognised(tmp_path: Path) -> None:
    """The highest bits of a prime may be 10: so it is in a quarter of OpenSSL's keys of 2048 bits."""
    while True:
        numbers = rsa.generate_private_key(65537, 2048).private_numbers()
        if min(numbers.p, numbers.q) >> 1022 == 0b10:
            break
    wanted = public(numbers.private_key(), tmp_path / "key")
    for prime in (numbers.p, numbers.q):
        data = prime.to_bytes(128, "little")
        assert wanted.prime_in(bytes(8) + data) == 8
        for size in (8, 64, 120):
            begin, end = bytes(120 - size) + data[:size], data[size:] + bytes(size - 8)
            assert wanted.prime_across([bytes(120), begin], [bytes(120), end])
            assert not wanted.prime_across([begin], [bytes(120)])


@pytest.mark.parametrize("kind", ["rsa", "ec", "ed25519"])
def test_a_key_in_pem(kind: str, rsa_key: rsa.RSAPrivateKey, tmp_path: Path) -> None:
    def new() -> Private:
        return ec.generate_private_key(ec.SECP256R1()) if kind == "ec" else ed25519.Ed25519PrivateKey.generate()

    key, other = (rsa_key, new()) if kind == "rsa" else (new(), new())
    for form in (serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.OpenSSH):
        text = b"\0" * 100 + pem(key, form) + b"\0"
        assert public(key, tmp_path / "a").pem_in(text) == 100
        assert public(key, tmp_path / "b", ssh=True).pem_in(text) == 100
        assert public(other, tmp_path / "c").pem_in(text) == -1
    assert public(key, tmp_path / "a").pem_in(b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n") == -1


def test_a_key_of_an_unknown_kind_is_none(rsa_key: rsa.RSAPrivateKey, tmp_path: Path) -> None:
    # PrivateKeyInfo with the algorithm 1.2.643.7.1.1.1.2, as libraries have it for their self-tests.
    algorithm = bytes.fromhex("06082a85030701010102")
    inner = b"\x02\x01\x00" + b"\x30" + bytes([len(algorithm)]) + algorithm + b"\x04\x04" + b"\x04\x02\x00\x01"
    text = base64.encodebytes(b"\x30" + bytes([len(inner)]) + inner)
    assert (
        public(rsa_key, tmp_path / "key").pem_in(
            b"-----BEGIN PRIVATE KEY-----\n" + text + b"-----END PRIVATE KEY-----\n"
        )
        == -1
    )


def test_what_is_no_public_key(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    with pytest.raises(OffmapError, match="is no certificate and no public key"):
        PublicKey(tmp_path / "text")
    with pytest.raises(OffmapError, match="No such file"):
        PublicKey(tmp_path / "missing")
