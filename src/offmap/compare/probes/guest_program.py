"""The program that runs in the guest: it is compiled once and cached. This module speaks its console protocol."""

import hashlib
import subprocess
import tempfile
from importlib.resources import files
from pathlib import Path

from offmap.errors import OffmapError
from offmap.lab.cache import cache_folder, write_atomically

MARK = "offmap-probe:"
"""The start of each line that the program prints. Other lines are the kernel's or the shell's."""


class ProbeError(OffmapError):
    """The guest did not do what was asked."""


def guest_program() -> bytes:
    """guest_program.c as a static program.

    The first call compiles it. Make that call on the machine itself: a disposable host would take ten times as long,
    and finds the program in the cache.

    Raises:
        OffmapError: there is no compiler, or it refuses.
    """
    source = files("offmap.compare.probes").joinpath("guest_program.c").read_bytes()
    kept = cache_folder("guest-programs") / hashlib.sha256(source).hexdigest()[:16]
    try:
        return kept.read_bytes()
    except FileNotFoundError:
        pass
    with tempfile.TemporaryDirectory() as folder:
        text, program = Path(folder) / "guest_program.c", Path(folder) / "guest_program"
        text.write_bytes(source)
        command = ["gcc", "-O2", "-static", "-o", str(program), str(text)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise OffmapError(
                f"cannot compile the guest's program: gcc: {error.strerror}", "install gcc and libc6-dev"
            ) from None
        if done.returncode != 0:
            last = done.stderr.strip().splitlines()[-1:]
            raise OffmapError(f"gcc refuses the guest's program: {''.join(last)}", "install libc6-dev")
        data = program.read_bytes()
    write_atomically(kept, data)
    return data


def parse_answer(text: str) -> tuple[list[list[str]], int, str] | None:
    """The program's answer to one command.

    Args:
        text: what the console has shown since the command.

    Returns:
        The words of each result, the errno (0 for success) and its text; None if the answer is not complete yet.
    """
    results = []
    for line in text.splitlines(keepends=True):
        if not line.endswith("\n"):
            return None
        _, mark, rest = line.rpartition(MARK)
        words = rest.split()
        if not mark or not words:
            continue
        if words[0] == "=":
            results.append(words[1:])
        elif words[0] == "done":
            return results, int(words[1]) if words[1:] and words[1].isdecimal() else -1, " ".join(words[2:])
    return None
