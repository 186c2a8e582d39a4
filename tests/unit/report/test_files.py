"""Files that are there whole or not at all."""

import os
import stat
from pathlib import Path

import pytest

from offmap.errors import ExitStatus, OffmapError
from offmap.report.files import PRIVATE, PUBLIC, replace_file


def test_mode_and_content_whatever_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "offmap.prom"
    before = os.umask(0o077)
    try:
        replace_file(path, "one\n", PUBLIC)
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        replace_file(path, "two\n", PRIVATE)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.read_text() == "two\n"
    assert [each.name for each in tmp_path.iterdir()] == ["offmap.prom"]


def test_a_reader_keeps_what_it_has_open(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_file(path, "old", PUBLIC)
    with path.open() as reader:
        replace_file(path, "new and longer", PUBLIC)
        assert reader.read() == "old"
    assert path.read_text() == "new and longer"


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    link = tmp_path / "link"
    link.symlink_to("folder/file")
    replace_file(link, "text", PUBLIC)
    assert link.is_symlink() and (tmp_path / "folder" / "file").read_text() == "text"


@pytest.mark.parametrize("name", [".", "fifo", "none/file", "file/below"])
def test_what_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OffmapError) as caught:
        replace_file(tmp_path / name, "text", PUBLIC)
    assert caught.value.exit_status is ExitStatus.FAILED and "\n" not in str(caught.value)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["fifo", "file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    replace_file(path, "old", PUBLIC)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OffmapError, match="ENOSPC"):
        replace_file(path, "new", PUBLIC)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
