"""A TPM in software and tpm2-tools for a disposable host."""

from pathlib import Path

from offmap.lab.packages import unpacked

__all__ = ["ENVIRONMENT", "SCRIPT", "tpm_root"]

SCRIPT = Path(__file__).with_name("swtpm.sh")
ENVIRONMENT = ("env", "PATH=/tmp/tpm/bin:/usr/bin:/bin:/usr/sbin:/sbin", "TPM2TOOLS_TCTI=swtpm:path=/tmp/tpm/sock")
"""What a command in the host needs in front of it, once SCRIPT has run there."""


def tpm_root() -> Path:
    """The folder with the unpacked packages."""
    return unpacked("swtpm", ("swtpm", "tpm2-tools"))
