"""What may be scanned for, and how it is given."""

import os
from pathlib import Path

import pytest

from offmap.audit.own_memory import LockedBuffer
from offmap.audit.secret import LONGEST, Secret, parse_secret
from offmap.errors import KernelError, OffmapError


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("text:correct horse", b"correct horse"),
        ("text:a:b:c:d:e", b"a:b:c:d:e"),
        ("hex:00112233445566778899", bytes.fromhex("00112233445566778899")),
        ("hex:00 11 22 33 44 55 66 77", bytes.fromhex("0011223344556677")),
    ],
)
def test_forms(text: str, data: bytes) -> None:
    with parse_secret(text) as secret:
        assert bytes(secret.view) == data and secret.length == len(data)
        assert secret.file_frames() == set()


def test_file_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"with a newline\n")
    with parse_secret(f"file:{path}") as secret:
        assert bytes(secret.view) == b"with a newline\n"


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_standard_input_loses_one_newline(tmp_path: Path, kind: str) -> None:
    if kind == "pipe":
        read, write = os.pipe()
    else:
        write = os.open(tmp_path / "secret", os.O_WRONLY | os.O_CREAT)
        read = os.open(tmp_path / "secret", os.O_RDONLY)
    os.write(write, b"from a pipe\n\n")
    os.close(write)
    saved = os.dup(0)
    os.dup2(read, 0)
    try:
        with parse_secret("-") as secret:
            assert bytes(secret.view) == b"from a pipe\n"
    finally:
        os.dup2(saved, 0)
        os.close(saved)
        os.close(read)


@pytest.mark.parametrize(
    "text", ["words", "", "text", "123:456", "text:seven77", "hex:001122334455667", "hex:zz", "text:" + "a" * 100]
)
def test_what_cannot_be_scanned_for(text: str) -> None:
    with pytest.raises(OffmapError) as caught:
        parse_secret(text)
    assert "\n" not in str(caught.value)


def test_file_that_is_too_long_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "long"
    path.write_bytes(os.urandom(LONGEST + 1))
    with pytest.raises(OffmapError, match=str(LONGEST)):
        parse_secret(f"file:{path}")
    with pytest.raises(KernelError):
        parse_secret(f"file:{tmp_path}/none")
    with pytest.raises(KernelError):
        parse_secret(f"file:{tmp_path}")


def test_it_is_wiped() -> None:
    with LockedBuffer(4096) as buffer:
        buffer.view[:5] = b"bytes"
        kept = buffer.view[:5]
    assert bytes(kept) == bytes(5)
    secret = Secret(b"to be forgotten")
    view = secret.view
    secret.close()
    assert bytes(view) == bytes(len("to be forgotten"))
