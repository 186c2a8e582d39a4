"""What is said of the guest's RAM while it is got: late, seldom, and nothing of it stays on a terminal."""

import io

import pytest

from offmap.cli.log import LogOptions, logging_to_stderr
from offmap.cli.populate_progress import PopulateProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO, seconds: float, steps: int = 100, log_format: str = "text") -> str:
    """What is written to `stream`, which is standard error, while getting the RAM takes so long."""
    now = [0.0]
    with pytest.MonkeyPatch.context() as patch, logging_to_stderr("offmap run", LogOptions(log_format=log_format)):
        patch.setattr("sys.stderr", stream)
        progress = PopulateProgress("1 GiB of secretmem memory", lambda: now[0])
        for step in range(steps + 1):
            now[0] = seconds * step / steps
            progress(step / steps)
    return stream.getvalue()


def test_what_is_quick_is_not_mentioned() -> None:
    assert shown(io.StringIO(), 0.9) == shown(Terminal(), 0.9) == ""


def test_a_line_every_few_seconds_where_nothing_can_be_redrawn() -> None:
    lines = shown(io.StringIO(), 20).splitlines()
    assert lines[0] == "offmap run: 1 GiB of secretmem memory: 5% ready"
    assert len(lines) == 4


def test_a_terminal_is_left_as_it_was() -> None:
    text = shown(Terminal(), 20)
    assert "\n" not in text
    assert text.startswith("\r\x1b[Koffmap run: 1 GiB of secretmem memory: 5% ready\r\x1b[K")
    assert text.endswith("\r\x1b[K")


def test_services_get_records_on_a_terminal_too() -> None:
    for stream in (io.StringIO(), Terminal()):
        lines = shown(stream, 20, log_format="json").splitlines()
        assert len(lines) == 4
        assert all(line.startswith("{") for line in lines)


def test_what_fails_midway_leaves_no_half_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 2.0])
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    progress = PopulateProgress("it", lambda: next(now))
    progress(0.0)
    progress(0.5)
    progress.clear()
    progress.clear()
    assert stream.getvalue() == "\r\x1b[Koffmap run: it: 50% ready\r\x1b[K"
