"""Sign a statement, and have the TPM quote it."""

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

from offmap.audit.evidence.envelope import Sealed, payload_of, to_file
from offmap.audit.evidence.statement import Statement

if TYPE_CHECKING:
    from securesystemslib.signer import Signer


def seal(statement: Statement, signer: "Signer | None", tpm_key: str | None) -> str:
    """What the evidence's file holds.

    Args:
        signer: of the key file; None for none.
        tpm_key: of the TPM, as tpm.quote takes it; None for no quote.

    Raises:
        OffmapError: the TPM gives no quote.
    """
    sealed = Sealed(payload_of(statement))
    if signer is not None:
        signature = sealed.envelope().sign(signer)
        sealed = replace(sealed, signatures={signature.keyid: bytes.fromhex(signature.signature)})
    if tpm_key is not None:
        from offmap.audit.evidence.tpm import quote

        sealed = replace(sealed, quote=quote(tpm_key, hashlib.sha256(sealed.pae()).digest()))
    return to_file(sealed)
