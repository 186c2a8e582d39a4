"""What can go wrong with a disposable host, beyond what every part of offmap knows."""

from offmap.errors import OffmapError


class LabError(OffmapError):
    """The disposable host could not be made, started or used."""


class LabTimeout(LabError):
    """A deadline passed: of the boot, or of a command in the host."""


class LabEnded(LabError):
    """The host stopped by itself, without a panic (it was powered off, or reset, or QEMU was killed).

    Attributes:
        console: the last lines of its console.
    """

    def __init__(self, what: str, console: str, remedy: str = "") -> None:
        self.console = console
        super().__init__(what, remedy)


class LabPanic(LabError):
    """The host kernel panicked.

    Attributes:
        oops: the kernel's own report, from its first line to the end of the console.
    """

    def __init__(self, oops: str) -> None:
        self.oops = oops
        headline = next((line.strip() for line in oops.splitlines() if line.strip()), "no text")
        super().__init__(
            f"the lab host's kernel panicked: {headline}", "read the oops text on its console (--console FILE)"
        )
