"""The kernel console of a disposable host: kept in memory, searched for a panic."""

import re
from collections.abc import Callable
from typing import BinaryIO

KEEP = 1 << 20  # bytes; a boot at loglevel 5 prints 1 KiB, a panic 4
_PANIC = re.compile(r"Kernel panic - not syncing[^\n]*")
# First lines of the reports that end in a panic under oops=panic (arch/x86/mm/fault.c, kernel/traps.c, dumpstack.c).
_REPORT = re.compile(
    r"^[^\n]*(?:BUG: |Oops: |general protection|double fault|stack segment|invalid opcode|divide error|int3: "
    r"|kernel BUG at)",
    re.MULTILINE,
)
_REPORT_LIMIT = 200  # lines before the panic in which its report begins


def panic_report(text: str) -> str | None:
    """Return the kernel's report of its panic, from its first line to the end of ``text``; None without a panic."""
    panic = _PANIC.search(text)
    if panic is None:
        return None
    line_start = text.rfind("\n", 0, panic.start()) + 1
    before = text[:line_start].splitlines(keepends=True)[-_REPORT_LIMIT:]
    report = "".join(before)
    first = _REPORT.search(report)
    return (report[first.start() :] if first else "") + text[line_start:]


class Console:
    """Takes the console's bytes as they come.

    Args:
        copy: a file that gets all of them.
        on_line: called with each complete line.
    """

    def __init__(self, copy: BinaryIO | None = None, on_line: Callable[[str], None] | None = None) -> None:
        self.fed = 0  # bytes that have come so far
        self._bytes = bytearray()
        self._line = bytearray()
        self._copy = copy
        self._on_line = on_line

    def feed(self, data: bytes) -> bool:
        """Take ``data``; return whether a panic has begun."""
        self.fed += len(data)
        self._bytes += data
        del self._bytes[:-KEEP]
        if self._copy:
            try:
                self._copy.write(data)
                self._copy.flush()
            except OSError:
                self._copy = None  # a full disk must not take the host with it
        self._line += data
        *lines, rest = self._line.split(b"\n")
        self._line = bytearray(rest)
        panic = False
        for line in lines:
            text = line.decode(errors="replace").rstrip("\r")
            panic = panic or bool(_PANIC.search(text))
            if self._on_line:
                self._on_line(text)
        return panic

    def clear(self) -> None:
        """Forget what was shown: another host starts."""
        self._bytes.clear()
        self._line.clear()

    @property
    def text(self) -> str:
        """What the console has shown, at most the last `KEEP` bytes."""
        return self._bytes.decode(errors="replace").replace("\r\n", "\n")

    def tail(self, lines: int = 15) -> str:
        """Return the last lines."""
        return "\n".join(self.text.rstrip().splitlines()[-lines:])
