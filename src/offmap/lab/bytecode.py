"""Compiled bytecode for the lab: there, the file system is slow and the compiler slower still."""

import compileall
import os
from functools import cache
from pathlib import Path

import offmap


@cache
def ensure_bytecode() -> None:
    """Compile those modules of our package that are not, even under PYTHONDONTWRITEBYTECODE; 10 ms when all of it is.

    A folder that we may not write to stays as it is: commands then start more slowly.
    """
    package = Path(offmap.__file__).resolve().parent
    if os.access(package, os.W_OK):
        compileall.compile_dir(package, quiet=2)
