"""Names of files, and the text of small ones, without ``pathlib``: importing it takes a tenth of a guest's start."""

import os

FileName = str | os.PathLike[str]


def read_text(path: FileName) -> str:
    """The text of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no text.
    """
    with open(path, encoding="utf-8") as file:  # noqa: PTH123 - pathlib's own would import it
        return file.read()
