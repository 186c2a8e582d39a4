"""The library's face: what is public, what its import costs, and that its documentation and types know all of it."""

import ast
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

import offmap

ROOT = Path(__file__).parents[2]


PUBLIC: dict[str, str] = vars(offmap)["_PUBLIC"]  # the module of each name


def test_every_public_name_is_there() -> None:
    assert set(PUBLIC) < set(vars(offmap)["__all__"]) <= set(dir(offmap))
    for name in PUBLIC:
        assert getattr(offmap, name) is not None


def test_type_checkers_know_the_same_names() -> None:
    stub = ast.parse((ROOT / "src/offmap/__init__.pyi").read_text())
    typed = {
        alias.asname: part.module for part in stub.body if isinstance(part, ast.ImportFrom) for alias in part.names
    }
    assert typed == PUBLIC
    assert (ROOT / "src/offmap/py.typed").is_file()


def test_the_documentation_names_each() -> None:
    text = (ROOT / "docs/library.md").read_text()
    assert [name for name in PUBLIC if f"`{name}" not in text] == []


def test_other_names_are_none() -> None:
    with pytest.raises(AttributeError, match="no attribute 'audit_everything'"):
        offmap.audit_everything  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("fresh", [False, True])
def test_a_disposable_host_boots_in_full_where_that_is_asked(monkeypatch: pytest.MonkeyPatch, fresh: bool) -> None:
    from offmap.lab import host, provision

    started: list[dict[str, Any]] = []

    def start(_kernel: object, **options: Any) -> object:
        started.append(options)
        return nullcontext()

    monkeypatch.setattr(provision, "host_kernel", lambda *_, **__: None)
    monkeypatch.setattr(host.LabHost, "start", start)
    with offmap.lab_host(fresh=fresh):
        assert started[0]["fresh"] is fresh


def test_importing_it_changes_nothing_and_costs_nothing() -> None:
    program = (
        "import signal, sys, threading, warnings; before = {*sys.modules, 'offmap'}\n"
        "import offmap\n"
        "assert {*sys.modules} == before, {*sys.modules} - before\n"
        "from offmap import *\n"
        "assert threading.active_count() == 1 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
        "import logging; assert not logging.getLogger('offmap').handlers and not logging.root.handlers\n"
        "assert not warnings.filters or 'offmap' not in str(warnings.filters)\n"
        "assert OffmapError('no', 'do').remedy == 'do' and run_job.__module__ == 'offmap.library'"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
