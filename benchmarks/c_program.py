"""The peers and guests of the benchmarks that are C, compiled when they are needed."""

import subprocess
import tempfile
from pathlib import Path

from offmap.errors import OffmapError

__all__ = ["compile_program", "static_program"]


def compile_program(source: Path, folder: Path, *options: str) -> Path:
    """Compile a C file into ``folder``, under its own name.

    Raises:
        OffmapError: there is no compiler, or it refuses.
    """
    program = folder / source.stem
    command = ["gcc", "-O2", "-Wall", "-Wextra", *options, "-o", str(program), str(source)]
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise OffmapError(f"cannot compile {source.name}: {error}", "install gcc and libc6-dev") from None
    return program


def static_program(source: Path) -> bytes:
    """A program that needs no library, for a guest that has none.

    Raises:
        OffmapError: as compile_program.
    """
    with tempfile.TemporaryDirectory() as folder:
        return compile_program(source, Path(folder), "-static").read_bytes()
