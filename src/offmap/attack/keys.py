"""Private keys: recognised in what was read, and proven by signing what the public key then verifies."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from offmap.errors import KernelError, OffmapError

_PEM = re.compile(rb"-----BEGIN ([A-Z ]*)PRIVATE KEY-----[A-Za-z0-9+/=\r\n]+-----END \1PRIVATE KEY-----\n?")
_BEGIN, _END = b"-----BEGIN ", b"-----END "
_MOST_PAIRS = 1 << 22
_LEAST_TOP = 0xB504F333F9DE6484  # the highest 64 bits of the square root of 2 (FIPS 186-5, A.1.3)
_NEEDS = "install them: pip install 'offmap[attack]'"


class PublicKey:
    """What the private key must belong to: of an X.509 certificate, or as OpenSSH writes it.

    Args:
        path: the file.

    Raises:
        OffmapError: it is neither, or a package is missing.
    """

    def __init__(self, path: Path) -> None:
        try:
            from cryptography.hazmat.primitives.serialization import load_pem_public_key, load_ssh_public_key
            from cryptography.x509 import load_pem_x509_certificate
        except ImportError:
            raise OffmapError("keys cannot be checked without the package cryptography", _NEEDS) from None
        try:
            data = path.read_bytes()
        except OSError as error:
            raise KernelError(f"reading {path}", error, "name a certificate or a public key") from None
        self._key: object  # one of a dozen kinds; only some can sign
        try:
            if b"BEGIN CERTIFICATE" in data:
                self._key = load_pem_x509_certificate(data).public_key()
            elif b"BEGIN PUBLIC KEY" in data:
                self._key = load_pem_public_key(data)
            else:
                self._key = load_ssh_public_key(data)
        except ValueError as error:
            raise OffmapError(f"{path} is no certificate and no public key: {error}", "give one") from None

    def signs(self, pem: bytes) -> bool:
        """Whether this private key signs what the public one verifies."""
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

        load = load_ssh_private_key if b"OPENSSH" in pem else load_pem_private_key
        try:
            return self._verifies(load(pem, None))
        except (ValueError, TypeError, UnsupportedAlgorithm):
            return False  # a disk has all kinds of keys, such as those of libraries' self-tests

    def pem_in(self, data: bytes) -> int:
        """Where its private key stands in PEM; -1 if it does not."""
        return next((match.start() for match in _PEM.finditer(data) if self.signs(match[0])), -1)

    @property
    def modulus(self) -> int:
        """Of an RSA key; 0 of another."""
        from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

        return self._key.public_numbers().n if isinstance(self._key, RSAPublicKey) else 0

    @property
    def prime_bytes(self) -> int:
        """Bytes of a prime of its RSA modulus, in whole words."""
        return (self.modulus.bit_length() + 127) // 128 * 8

    def prime_across(self, begins: Sequence[bytes], ends: Sequence[bytes]) -> bool:
        """Whether a prime begins in one of these ends of pages, and goes on in one of those starts of pages.

        Raises:
            ValueError: there are too many to try.
        """
        modulus, count = self.modulus, self.prime_bytes // 8
        if not (modulus and begins and ends):
            return False
        pairs = []
        for words in range(1, count):  # of the prime in the first page
            low = {each[-8 * words :] for each in begins if each[-8 * words] & 1}
            stop = 8 * (count - words)
            high = {each[:stop] for each in ends if int.from_bytes(each[stop - 8 : stop], "little") >= _LEAST_TOP}
            pairs.append((8 * words, low, high))
        if sum(len(low) * len(high) for _, low, high in pairs) > _MOST_PAIRS:
            raise ValueError(f"{len(begins)} begin and {len(ends)} end with words of a number")
        for size, low, high in pairs:
            tops = [int.from_bytes(each, "little") << 8 * size for each in high]
            for bottom in (int.from_bytes(each, "little") for each in low):
                if any(modulus % (top | bottom) == 0 and self._from_prime(modulus, top | bottom) for top in tops):
                    return True
        return False

    def prime_in(self, data: bytes) -> int:
        """Where a prime of its RSA modulus stands, as OpenSSL keeps big numbers in memory; -1 if none does.

        Such a prime of n bits is odd and at least the square root of 2 times 2^(n-1): few places have to be tried.
        """
        modulus, size = self.modulus, self.prime_bytes
        words = np.frombuffer(data, dtype="<u8", count=len(data) // 8)
        count = size // 8
        if not modulus or len(words) < count:
            return -1
        first, last = words[: len(words) - count + 1], words[count - 1 :]
        for at in np.flatnonzero((first & np.uint64(1) == 1) & (last >= np.uint64(_LEAST_TOP))).tolist():
            prime = int.from_bytes(data[8 * at : 8 * at + size], "little")
            if modulus % prime == 0 and self._from_prime(modulus, prime):
                return 8 * at
        return -1

    def _from_prime(self, modulus: int, prime: int) -> bool:
        """Whether a key with this prime signs what the public one verifies."""
        from cryptography.hazmat.primitives.asymmetric import rsa

        other = modulus // prime
        if not isinstance(self._key, rsa.RSAPublicKey):
            return False
        exponent = self._key.public_numbers().e
        try:
            secret = pow(exponent, -1, (prime - 1) * (other - 1))
            numbers = rsa.RSAPrivateNumbers(
                prime,
                other,
                secret,
                secret % (prime - 1),
                secret % (other - 1),
                rsa.rsa_crt_iqmp(prime, other),
                rsa.RSAPublicNumbers(exponent, modulus),
            )
            return self._verifies(numbers.private_key())
        except ValueError:
            return False

    def _verifies(self, private: object) -> bool:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

        challenge, public = os.urandom(32), self._key
        try:
            if isinstance(private, rsa.RSAPrivateKey) and isinstance(public, rsa.RSAPublicKey):
                scheme = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
                public.verify(private.sign(challenge, scheme, hashes.SHA256()), challenge, scheme, hashes.SHA256())
            elif isinstance(private, ed25519.Ed25519PrivateKey) and isinstance(public, ed25519.Ed25519PublicKey):
                public.verify(private.sign(challenge), challenge)
            elif isinstance(private, ec.EllipticCurvePrivateKey) and isinstance(public, ec.EllipticCurvePublicKey):
                algorithm = ec.ECDSA(hashes.SHA256())
                public.verify(private.sign(challenge, algorithm), challenge, algorithm)
            else:
                return False
        except InvalidSignature:
            return False
        return True


def begins_pem(page: bytes) -> bytes:
    """This page, if a key in PEM may begin there that goes on in another page; else nothing."""
    cut = any(page.endswith(_BEGIN[:size]) for size in range(1, len(_BEGIN)))
    return page if cut or page.rfind(_BEGIN) > page.rfind(_END) else b""


def ends_pem(page: bytes) -> bytes:
    """This page, if a key in PEM may end there that began in another page; else nothing."""
    end = page.find(b"-----")
    return page if end >= 0 and re.fullmatch(rb"[A-Za-z0-9+/=\r\n -]*", page[:end]) else b""
