"""What the cache folder's helpers promise."""

import hashlib
from io import BufferedReader
from pathlib import Path

import pytest

from offmap.lab import cache


def test_a_file_is_hashed_once_while_it_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_SETTLED_NS", -1)
    read: list[BufferedReader] = []
    digest_of = hashlib.file_digest

    def counted(file: BufferedReader, name: str) -> object:
        read.append(file)
        return digest_of(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    path = tmp_path / "file"
    path.write_bytes(b"one")
    assert {cache.sha256_of(path) for _ in range(3)} == {hashlib.sha256(b"one").hexdigest()} and len(read) == 1
    path.unlink()
    path.write_bytes(b"two!")
    assert cache.sha256_of(path) == hashlib.sha256(b"two!").hexdigest() and len(read) == 2


def test_a_file_that_has_just_changed_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"one", b"two", b"six"):
        path.write_bytes(content)
        assert cache.sha256_of(path) == hashlib.sha256(content).hexdigest()
