"""The doctor's exit status: what hides, what does not, what cannot be said."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from offmap.audit.result import Pages
from offmap.audit.verdict import Verdict
from offmap.doctor import Diagnosis, Health, _health, _nesting_panics, exit_status
from offmap.errors import ExitStatus
from offmap.memory.backend import BACKENDS

from .audit.report.samples import page_counts


@pytest.mark.parametrize(
    ("healths", "status"),
    [
        ([Health.HIDING, Health.REFUSED], ExitStatus.DONE),
        ([Health.MOSTLY], ExitStatus.DONE),
        ([Health.UNVERIFIED, Health.REFUSED], ExitStatus.UNDETERMINED),
        ([Health.UNVERIFIED, Health.HIDING], ExitStatus.DONE),
        ([Health.PLAIN, Health.REFUSED], ExitStatus.EXPOSED),
        ([], ExitStatus.EXPOSED),
    ],
)
def test_exit_status(healths: list[Health], status: ExitStatus) -> None:
    assert exit_status([Diagnosis("some", True, health) for health in healths]) is status


def test_a_name_and_its_health_are_two_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from offmap.cli.doctor import run

    found = [Diagnosis(name, True, Health.REFUSED) for name in BACKENDS]
    monkeypatch.setattr("offmap.doctor.examine", lambda: found)
    run(Namespace(json=False))
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [[f"{n}:", "refused"] for n in BACKENDS]


def test_a_plain_backend_never_counts_as_hiding() -> None:
    assert exit_status([Diagnosis("anon", False, Health.HIDING)]) is ExitStatus.EXPOSED


@pytest.mark.parametrize(
    ("verdict", "pages", "health"),
    [
        (Verdict.HIDDEN, page_counts(pages_populated=9), Health.HIDING),
        (Verdict.EXPOSED, page_counts(pages_populated=9, direct_map_pages=1), Health.PLAIN),
        (Verdict.EXPOSED, page_counts(pages_populated=9, alias_pages=1), Health.MOSTLY),
        (Verdict.EXPOSED, page_counts(pages_populated=9, alias_pages=1, unknown_pages=1), Health.UNVERIFIED),
        (Verdict.EXPOSED, page_counts(pages_populated=9), Health.UNVERIFIED),
        (Verdict.UNKNOWN, page_counts(pages_populated=9, unknown_pages=1), Health.UNVERIFIED),
    ],
)
def test_what_was_not_seen_is_never_called_hiding(verdict: Verdict, pages: Pages, health: Health) -> None:
    result: Any = SimpleNamespace(verdict=verdict, pages=pages)
    assert _health(result) is health


@pytest.mark.parametrize(
    ("release", "nested", "panics"),
    [
        ("6.12.117+deb12-amd64", "1\n", True),
        ("6.1.0-1-amd64", "Y\n", True),
        ("6.12.1", "0\n", False),
        ("7.3.0", "1\n", False),
    ],
)
def test_where_a_nested_guest_would_panic_the_host(release: str, nested: str, panics: bool, tmp_path: Path) -> None:
    (tmp_path / "nested").write_text(nested)
    assert _nesting_panics(release, tmp_path / "nested") is panics
    assert not _nesting_panics(release, tmp_path / "none")
