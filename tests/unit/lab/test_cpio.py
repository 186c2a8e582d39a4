"""The newc writer, read back by a reader of its own and by the cpio command."""

import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from offmap.lab.cpio import TRAILER, Entry, char_device, directory, newc, regular, symlink

ENTRIES = [
    directory("dev"),
    char_device("dev/console", 5, 1),
    regular("init", b"#!/bin/sh\n", 0o755),
    regular("empty", b""),
    regular("odd", b"12345"),
    symlink("link", "init"),
]


def read_newc(archive: bytes) -> list[Entry]:
    """Parse as buffer-format.rst says it."""
    entries: list[Entry] = []
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        assert at % 4 == 0
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name = archive[at + 110 : at + 110 + fields[11]]
        assert name.endswith(b"\0")
        data_at = (at + 110 + fields[11] + 3) & ~3
        data = archive[data_at : data_at + fields[6]]
        if name == TRAILER.encode() + b"\0":
            return entries
        entries.append(Entry(name[:-1].decode(), fields[1], data, (fields[9], fields[10])))
        at = (data_at + fields[6] + 3) & ~3


def test_round_trip() -> None:
    assert read_newc(newc(ENTRIES)) == ENTRIES


def test_same_entries_give_the_same_bytes() -> None:
    assert newc(ENTRIES) == newc(list(ENTRIES))
    assert len(newc(ENTRIES)) % 4 == 0


@pytest.mark.parametrize("path", ["", "/init", "init"])
def test_refuses_paths_that_do_not_work(path: str) -> None:
    with pytest.raises(ValueError, match="archive path"):
        newc([regular("init", b""), regular(path, b"")])


def test_cpio_command_unpacks_it(tmp_path: Path) -> None:
    if not shutil.which("cpio"):
        pytest.skip("no cpio command: a second opinion on the format is missing")
    entries = [entry for entry in ENTRIES if not stat.S_ISCHR(entry.mode)]  # nodes need root
    subprocess.run(["cpio", "-i", "--quiet"], input=newc(entries), cwd=tmp_path, check=True)
    assert (tmp_path / "init").read_bytes() == b"#!/bin/sh\n"
    assert stat.S_IMODE((tmp_path / "init").stat().st_mode) == 0o755
    assert (tmp_path / "link").readlink() == Path("init")
    assert (tmp_path / "odd").read_bytes() == b"12345"
