"""A VM whose guest takes more memory during an audit is looked at again, and no other."""

import os
from typing import Any

import pytest

from offmap.audit import audit as auditing
from offmap.audit.audit import Snapshot, snapshot_processes


class Open:
    """A kcore in which nothing changes."""

    def __enter__(self) -> "Open":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def changed(self) -> bool:
        return False


def snapshot(growing: bool) -> Snapshot:
    nothing: Any = None
    return Snapshot(nothing, nothing, nothing, nothing, growing)


@pytest.mark.parametrize(
    ("growing", "looks", "settled"),
    [([False], 1, True), ([True, False], 2, True), ([True, True, False], 3, True), ([True] * 9, 3, False)],
)
def test_it_is_looked_at_again_a_few_times(
    monkeypatch: pytest.MonkeyPatch, growing: list[bool], looks: int, settled: bool
) -> None:
    asked: list[list[int]] = []

    def look(processes: Any, kcore: Any, options: Any) -> dict[int, Snapshot]:
        asked.append([process.pid for process in processes])
        state = growing[len(asked) - 1]
        return {process.pid: snapshot(state and process.pid == os.getpid()) for process in processes}

    monkeypatch.setattr(auditing, "Kcore", Open)
    monkeypatch.setattr(auditing, "_snapshots", look)
    found = snapshot_processes([os.getpid(), os.getppid()])
    assert asked == [[os.getpid(), os.getppid()], *[[os.getpid()]] * (looks - 1)]
    mine = found[os.getpid()]
    assert isinstance(mine, Snapshot) and mine.growing is not settled
