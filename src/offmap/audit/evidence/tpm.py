"""Ask the host's TPM for a quote, by the distribution's tpm2-tools.

Their options and the environment (TPM2TOOLS_TCTI) say which TPM. The key is the caller's: evidence is worth what the
verifier knows of it.
"""

import subprocess
import tempfile
from pathlib import Path

from offmap.audit.evidence.envelope import RawQuote
from offmap.errors import OffmapError

PCRS = tuple(range(15))
"""Registers that are quoted (TCG PC Client Platform Firmware Profile, and systemd's for the rest): 0-7 firmware and
secure boot, 8 and 9 boot loader, kernel, command line and initrd, 10 IMA, 11 to 13 a unified kernel image, 14 shim."""

_BANK = "sha256"
_ATTEMPTS = 3  # IMA may extend its register while it is being read
_LONGEST = 120  # seconds: a discrete TPM takes about one for a signature


def quote(key: str, qualifying: bytes) -> RawQuote:
    """Have the TPM sign the registers and `qualifying`.

    Args:
        key: handle (0x81…) or context file of a restricted signing key.
        qualifying: 32 bytes.

    Raises:
        OffmapError: there is no TPM, no such key, or no program to ask with.
    """
    if key.startswith("-") or not key:
        raise OffmapError(f"{key!r} is no key of a TPM", "give a handle like 0x81010002, or a context file")
    reason = ""
    for _ in range(_ATTEMPTS):
        with tempfile.TemporaryDirectory(prefix="offmap-quote-") as folder:
            paths = [Path(folder, name) for name in ("attest", "signature", "pcrs")]
            selection = f"{_BANK}:{','.join(map(str, PCRS))}"
            argv = ["tpm2_quote", "-Q", "-c", key, "-l", selection, "-q", qualifying.hex(), "-g", "sha256"]
            argv += ["-m", str(paths[0]), "-s", str(paths[1]), "-o", str(paths[2]), "-F", "values"]
            reason = _run(argv)
            if not reason:
                return RawQuote(*(path.read_bytes() for path in paths))
    raise OffmapError("the TPM gave no quote", "check the TPM and its key with tpm2_readpublic -c KEY", why=reason)


def _run(argv: list[str]) -> str:
    """Run it; return why it failed, in one line, or nothing."""
    try:
        done = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_LONGEST,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        raise OffmapError(f"cannot ask the TPM: there is no {argv[0]} here", "install tpm2-tools") from None
    except subprocess.TimeoutExpired:
        return f"it did not answer in {_LONGEST} s"
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.startswith("ERROR: ")]  # the tool's own
    return lines[0] if lines else f"{argv[0]} ended with status {done.returncode}"
