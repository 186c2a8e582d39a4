"""Make the corpus of a target: of many inputs, those few that reach every line and branch that any of them reaches."""

import os
import sys
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import offmap

from .choices import Choices
from .run import CORPUS, TARGETS, corpus, inputs

_RANDOM = 4000  # inputs beside those that a run has left
_SOURCES = f"{os.path.dirname(offmap.__file__)}/"  # noqa: PTH120


class _Tracer:
    """Collects jumps from one line of offmap to another."""

    def __init__(self) -> None:
        self.jumps: set[tuple[str, int, int]] = set()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:  # as sys.settrace has it
        name = frame.f_code.co_filename
        if not name.startswith(_SOURCES):
            return None
        last = -1

        def local(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal last
            if event == "line":
                self.jumps.add((name, last, frame.f_lineno))
                last = frame.f_lineno
            elif event == "return":
                self.jumps.add((name, last, -1))
            return local

        return local


def store_corpus(name: str, folder: Path) -> int:
    """Choose among the inputs in `folder`, the corpus as it is, and random ones. Return how many were kept."""
    candidates = {*corpus(name), *islice(inputs(0), _RANDOM)}
    if folder.is_dir():
        candidates |= {path.read_bytes() for path in folder.iterdir()}
    kept: list[bytes] = []
    seen: set[tuple[str, int, int]] = set()
    with TARGETS[name]() as target:
        for data in sorted(candidates, key=lambda data: (len(data), data)):
            tracer = _Tracer()
            sys.settrace(tracer)
            try:
                target.case(Choices(data))
            finally:
                sys.settrace(None)
            if tracer.jumps - seen:
                seen |= tracer.jumps
                kept.append(data)
    CORPUS.mkdir(exist_ok=True)
    (CORPUS / f"{name}.txt").write_text("".join(f"{data.hex()}\n" for data in kept))
    return len(kept)
