"""``offmap audit --evidence`` and ``--verify``: a verdict as a signed file, and the check of one."""

import argparse
import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from offmap.errors import ExitStatus, KernelError, OffmapError

if TYPE_CHECKING:
    from offmap.audit.report.hosts import HostReport

_LONGEST_NONCE = 128


def add_evidence_options(parser: argparse.ArgumentParser) -> None:
    """Add what makes evidence, and what checks it."""
    group = parser.add_argument_group("evidence (docs/evidence.md)")
    group.add_argument("--evidence", type=Path, metavar="FILE", help="also write the verdict as a signed file")
    group.add_argument(
        "--evidence-key",
        type=Path,
        metavar="FILE",
        help="private key that signs it (PEM, Ed25519 or ECDSA); with --verify, the public key",
    )
    group.add_argument(
        "--tpm",
        metavar="KEY",
        help="have the host's TPM quote it with this key (a handle or a context file of tpm2-tools); with --verify, "
        "a file with its public key (PEM)",
    )
    group.add_argument(
        "--nonce",
        metavar="TEXT",
        help=f"state this too (1 to {_LONGEST_NONCE} printable characters), so that an old file cannot pass for a new "
        "one; with --verify, what must be stated",
    )
    group.add_argument(
        "--policy", type=Path, metavar="FILE", help="with --verify: what is expected, or an earlier evidence"
    )


def add_verify(which: "argparse._MutuallyExclusiveGroup") -> None:
    """Add what can be asked for in the place of an audit."""
    which.add_argument(
        "--verify", type=Path, metavar="FILE", help="check evidence from another host, and say what must be trusted"
    )


def run_verify(args: argparse.Namespace) -> int:
    """Check a file; the exit status is that of the verdict that it states, or 2 if it is refused.

    Raises:
        OffmapError: nothing could be checked.
    """
    if args.evidence is not None:
        raise OffmapError("--verify makes no evidence", "leave out --evidence")
    from offmap.audit.evidence.libraries import require_libraries

    require_libraries()
    from offmap.audit.evidence.text import render_verification
    from offmap.audit.evidence.verify import Expected, verify
    from offmap.audit.verdict import exit_status_of

    tpm_key = None if args.tpm is None else Path(args.tpm)
    found = verify(args.verify, Expected(args.evidence_key, tpm_key, args.nonce, args.policy))
    print(json.dumps(found.to_json(), indent=2) if args.json else render_verification(found), flush=True)
    return int(exit_status_of(found.verdict) if found.accepted else ExitStatus.FAILED)


class EvidenceOutput:
    """The file that ``--evidence`` names, from before the audit to its end.

    An audit that fails leaves no file: an earlier one is removed at the beginning, so that no old verdict stays.

    Args:
        args: of add_evidence_options.

    Raises:
        OffmapError: the options do not go together, a key cannot be used, or the old file cannot be removed.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._path: Path | None = args.evidence
        self._key: Path | None = args.evidence_key
        self._tpm: str | None = args.tpm
        self._nonce: str | None = args.nonce
        if args.policy is not None:
            raise OffmapError("--policy is for checking evidence", "add --verify FILE")
        if self._path is None:
            if self._key is not None or self._tpm is not None or self._nonce is not None:
                raise OffmapError("--evidence-key, --tpm and --nonce are for evidence", "add --evidence FILE")
            return
        if args.watch is not None or args.merge:
            raise OffmapError("evidence is of one audit", "leave out --watch and --merge")
        if self._key is None and self._tpm is None:
            raise OffmapError("evidence that nobody signs shows nothing", "add --evidence-key FILE or --tpm KEY")
        if self._nonce is not None and not (self._nonce.isprintable() and 0 < len(self._nonce) <= _LONGEST_NONCE):
            raise OffmapError("that is no nonce", f"give 1 to {_LONGEST_NONCE} printable characters")
        from offmap.audit.evidence.libraries import require_libraries

        require_libraries()
        from offmap.audit.evidence.host import moment
        from offmap.audit.evidence.keys import signer

        self._signer = None if self._key is None else signer(self._key)
        with contextlib.suppress(FileNotFoundError):
            try:
                self._path.unlink()
            except FileNotFoundError:
                raise
            except OSError as error:
                raise KernelError(f"removing the old {self._path}", error, "name another file") from None
        self._began = moment()

    def write(self, report: "HostReport") -> None:
        """Write the evidence of this report, if it was asked for.

        Raises:
            OffmapError: it cannot be signed, quoted or written.
        """
        if self._path is None:
            return
        from offmap.audit.evidence.make import make_statement
        from offmap.audit.evidence.seal import seal
        from offmap.report.files import PUBLIC, replace_file

        statement = make_statement(report, self._nonce, self._began)
        replace_file(self._path, seal(statement, self._signer, self._tpm), PUBLIC)
