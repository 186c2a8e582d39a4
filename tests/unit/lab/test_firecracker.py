"""The user's own Firecracker."""

from pathlib import Path

import pytest

from offmap.lab.errors import LabError
from offmap.lab.firecracker import own_firecracker


def test_a_program_is_named_by_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "firecracker").write_bytes(b"")
    (tmp_path / "firecracker").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    assert own_firecracker(Path("firecracker")) == tmp_path / "firecracker"
    assert own_firecracker(None) is None


@pytest.mark.parametrize("name", ["nothing", "folder", "text"])
def test_what_is_no_program_is_refused_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_bytes(b"")
    with pytest.raises(LabError, match="is no program; name a Firecracker with --firecracker PATH"):
        own_firecracker(tmp_path / name)
