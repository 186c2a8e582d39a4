"""Coverage guides the inputs (atheris): what reaches something new is kept, and changed again."""

import hashlib
import os
import random
import sys
import time
import zlib
from itertools import islice
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["offmap.devices", "offmap.sandbox"]):
    from .run import Runner, corpus, inputs

_LONGEST = 512  # bytes of an input
_SEEDS = 64  # random inputs to begin with, beside the corpus
_SHORTEST = 64  # shorter ones make a driver that does nothing: they are made longer, by bytes that follow from them


def unpack(name: str, folder: Path) -> Path:
    """Put the stored inputs of a target into a folder of its own, one a file, as libFuzzer reads them."""
    where = folder / name
    where.mkdir(parents=True, exist_ok=True)
    for data in corpus(name):
        (where / hashlib.sha1(data, usedforsecurity=False).hexdigest()).write_bytes(data)
    return where


def lengthened(data: bytes) -> bytes:
    """`data`, and if it is short some more: always the same for the same."""
    missing = _SHORTEST - len(data)
    return data if missing <= 0 else data + random.Random(zlib.crc32(data)).randbytes(missing + _SHORTEST)


def fuzz(name: str, seconds: float, seed: int, folder: Path) -> None:
    """Run a target for so long, and print the score. Does not return; a bug ends it with another status."""
    runner = Runner(name)
    end = time.monotonic() + seconds

    def one(data: bytes) -> None:
        runner(lengthened(data))
        if time.monotonic() >= end:
            print(f"{name}: {runner.score}", flush=True)
            runner.close()
            os._exit(0)

    where = unpack(name, folder)
    for data in islice(inputs(seed), _SEEDS):
        (where / hashlib.sha1(data, usedforsecurity=False).hexdigest()).write_bytes(data)
    options = [
        f"-max_len={_LONGEST}",
        "-len_control=0",
        f"-seed={seed % (1 << 31) + 1}",
        "-verbosity=0",
        f"-artifact_prefix={folder}/failed-{name}-",
        "-timeout=60",
    ]
    atheris.Setup([sys.argv[0], *options, str(where)], one)
    atheris.Fuzz()
