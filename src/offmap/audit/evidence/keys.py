"""Keys of evidence, from PEM files: Ed25519, or ECDSA on NIST's curves."""

from pathlib import Path
from typing import TYPE_CHECKING

from offmap.errors import KernelError, OffmapError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
    from securesystemslib.signer import CryptoSigner, SSlibKey

_USABLE = ("ed25519", "ecdsa")


def signer(path: Path) -> "CryptoSigner":
    """What signs with the private key in this file.

    Raises:
        KernelError: the file cannot be read.
        OffmapError: it holds no key that can sign evidence.
    """
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from securesystemslib.signer import CryptoSigner

    content = _content(path)
    try:
        key = load_pem_private_key(content, None)
        if not isinstance(key, Ed25519PrivateKey | EllipticCurvePrivateKey):
            raise ValueError("it is neither Ed25519 nor ECDSA")
        return CryptoSigner(key)
    except (ValueError, TypeError, OSError) as error:  # TypeError: it is encrypted
        raise _useless(path, error, "make one: openssl genpkey -algorithm ed25519 -out FILE") from None
    except Exception as error:  # cryptography and securesystemslib have exceptions of their own for strange keys
        raise _useless(path, error, "make one: openssl genpkey -algorithm ed25519 -out FILE") from None


def public_key(path: Path) -> "PublicKeyTypes":
    """The public key in this file.

    Raises:
        KernelError: the file cannot be read.
        OffmapError: it holds none.
    """
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    content = _content(path)
    try:
        return load_pem_public_key(content)
    except Exception as error:  # cryptography has exceptions of its own for strange keys
        raise _useless(path, error, "give the public key: openssl pkey -in PRIVATE -pubout -out FILE") from None


def verifying_key(path: Path) -> "SSlibKey":
    """What checks signatures by the public key in this file.

    Raises:
        KernelError: the file cannot be read.
        OffmapError: it holds no key that can have signed evidence.
    """
    from securesystemslib.signer import SSlibKey

    key = public_key(path)
    try:
        found = SSlibKey.from_crypto(key)
    except Exception as error:  # securesystemslib has exceptions of its own for curves that it does not know
        raise _useless(path, error, "give an Ed25519 or ECDSA key") from None
    if found.keytype not in _USABLE:
        raise _useless(path, "it is neither Ed25519 nor ECDSA", "give the public key of --evidence-key")
    return found


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise KernelError(f"reading {path}", error, "give a key file (PEM)") from None


def _useless(path: Path, why: object, remedy: str) -> OffmapError:
    reason = str(why).splitlines()[0] if str(why) else type(why).__name__
    return OffmapError(f"{path} is no key for evidence", remedy, why=reason)
