"""A snapshot is used only if it is ours, whole and of this boot of the machine; the store stays within its limit."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from offmap.errors import OffmapError
from offmap.lab import snapshot as module
from offmap.lab.cache import cache_folder
from offmap.lab.qemu import HostOptions
from offmap.lab.snapshot import Kind, Snapshots, SnapshotUnusable

KIND = Kind("0123456789abcdef", "6.12 2048M")
OPTIONS = HostOptions(256 << 20, nodes=2)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Snapshots:
    monkeypatch.setenv("OFFMAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_SPARE", 0)
    return Snapshots()


def make(store: Snapshots, kind: Kind = KIND, written: int = 1 << 20) -> Path:
    with store.making(kind, OPTIONS) as draft:
        for fd in draft.ram.fds:
            os.pwrite(fd, b"x" * written, 4096)
        os.write(draft.state, b"devices")
        draft.finish(b"console\n")
    return store.folder / kind.name


def test_what_was_made_is_opened(store: Snapshots) -> None:
    make(store)
    with store.open(KIND) as opened:
        assert [os.fstat(fd).st_size for fd in opened.ram.fds] == [128 << 20] * 2
        assert not opened.ram.shared
        assert os.read(opened.state, 100) == b"devices"
        assert opened.console == b"console\n"
        store.drop(KIND.name)
        assert os.pread(opened.ram.fds[1], 1, 4096) == b"x"
    with pytest.raises(SnapshotUnusable, match="no snapshot of this kind"):
        store.open(KIND)


def test_nobody_else_may_look_into_it(store: Snapshots) -> None:
    folder = make(store)
    assert store.folder.stat().st_mode & 0o077 == 0
    assert all((folder / name).stat().st_mode & 0o077 == 0 for name in ("node0", "node1", "state"))


def unfinished(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def half_written(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 20)


def shorter(folder: Path) -> None:
    os.truncate(folder / "node1", 64 << 20)


def written_to(folder: Path) -> None:
    before = (folder / "node0").stat()
    with (folder / "node0").open("r+b") as file:
        file.write(b"y")
    os.utime(folder / "node0", ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(folder: Path) -> None:
    data = (folder / "state").read_bytes()
    (folder / "state").unlink()
    (folder / "state").write_bytes(data)


def a_link(folder: Path) -> None:
    (folder / "node0").rename(folder / "elsewhere")
    (folder / "node0").symlink_to("elsewhere")


def for_others(folder: Path) -> None:
    (folder / "node0").chmod(0o666)


def for_others_as_a_whole(folder: Path) -> None:
    folder.chmod(0o777)


def of_another_format(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 0}))


def of_another_boot(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "boot": "x"}))


DAMAGE = (
    *(unfinished, half_written, shorter, written_to, replaced, a_link),
    *(for_others, for_others_as_a_whole, of_another_format, of_another_boot),
)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_or_foreign_is_not_used_and_is_made_anew(store: Snapshots, damage: Callable[[Path], None]) -> None:
    folder = make(store)
    damage(folder)
    with pytest.raises(SnapshotUnusable):
        store.open(KIND)
    make(store)
    store.open(KIND).close()


@pytest.mark.skipif(os.geteuid() != 0, reason="not root: no files of another user can be made")
def test_another_users_is_not_used(store: Snapshots) -> None:
    folder = make(store)
    os.chown(folder / "state", 12345, -1)
    with pytest.raises(SnapshotUnusable, match="not this user's"):
        store.open(KIND)


def test_an_unfinished_draft_leaves_nothing(store: Snapshots) -> None:
    with suppress(ZeroDivisionError), store.making(KIND, OPTIONS):
        raise ZeroDivisionError
    assert [path.name for path in store.folder.iterdir()] == ["locks"]


def test_two_do_not_make_the_same(store: Snapshots) -> None:
    other = Kind("f" * 16, "other")
    with store.making(KIND, OPTIONS) as draft:
        with pytest.raises(SnapshotUnusable, match="another process is making"), store.making(KIND, OPTIONS):
            pass
        make(store, other)  # and a third does not remove what is being made
        assert draft.folder.is_dir()
        draft.finish(b"")
    assert {entry.name for entry in store.listed()} == {KIND.name, other.name}


def test_the_longest_unused_goes(store: Snapshots, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFMAP_SNAPSHOT_LIMIT", "160M")
    kinds = [Kind(f"{number:016x}", "") for number in range(4)]
    for number, kind in enumerate(kinds):
        folder = make(store, kind, 20 << 20)  # on each of two nodes
        os.utime(folder / "used", (1000 + number, 1000 + number))
    store.open(kinds[1]).close()
    make(store, KIND, 20 << 20)
    assert {entry.name for entry in store.listed()} == {KIND.name, kinds[1].name, kinds[3].name}


def test_what_an_earlier_boot_left_goes(store: Snapshots) -> None:
    of_another_boot(make(store, Kind("e" * 16, "old")))
    assert [entry.current for entry in store.listed()] == [False]
    make(store)
    assert [entry.name for entry in store.listed()] == [KIND.name]


def test_none_are_kept_if_so_wanted(store: Snapshots, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFMAP_SNAPSHOT_LIMIT", "0")
    with pytest.raises(SnapshotUnusable, match="is 0"):
        make(store)
    monkeypatch.setenv("OFFMAP_SNAPSHOT_LIMIT", "much")
    with pytest.raises(OffmapError, match="'much' is not a size"):
        make(store)


def test_a_full_disk_keeps_none(store: Snapshots, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SPARE", 1 << 60)
    with pytest.raises(SnapshotUnusable, match="MiB left"):
        make(store)
    assert cache_folder("snapshots") == store.folder
