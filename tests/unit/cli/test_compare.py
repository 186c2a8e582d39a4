"""The command line of the comparison."""

from pathlib import Path

import pytest

from offmap.cli import compare
from offmap.cli.main import main
from offmap.compare.cell_result import CellOutcome, CellResult
from offmap.compare.questions import MIN_PAIRS
from offmap.compare.spec import CellSpec
from offmap.compare.store import Store


def test_the_list_says_how_cells_stand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Store(tmp_path) as store:
        store.put(CellResult(spec=CellSpec("memfd"), outcome=CellOutcome.OOPS, time="2026-01-01"))
        store.path(CellSpec("anon")).write_text("{")
    assert main(["compare", "--list", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("anon on debian:6.12, guest debian:6.12, 1 vCPU: damaged (")
    assert lines[1] == "memfd on debian:6.12, guest debian:6.12, 1 vCPU: oops, 2026-01-01, of other code"
    assert lines[2].endswith("1 vCPU: not run") and lines[-1] == "13 cells"


def test_the_list_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["compare", "--list", "--full", "--backend", "anon", "--vcpus", "4", "--out", str(tmp_path / "new")]
    assert main(argv) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "24 cells"  # 4 hosts, 3 guests, 2 clocks
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("path", ["own/bzImage", "./own/bzImage"])
def test_paths_of_kernels_are_made_absolute(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["compare", "--list", "--backend", "anon", "--host-kernel", path, "--host-kernel", "debian:6.12"]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"anon on {tmp_path}/own/bzImage, guest debian:6.12, 1 vCPU: not run"
    assert lines[1].startswith("anon on debian:6.12")


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["--backend", "ram"], "'ram' is no kind of guest RAM"),
        (["--native", "--host-kernel", "debian:6.1"], "--native measures on the running kernel"),
        (["--native", "--dask", "tcp://x"], "not allowed with argument"),
        (["--host-kernel", "native"], "give --native"),
        (["--guest-kernel", "native"], "a guest cannot be native"),
        (["--vcpus", "0"], "cannot have 0 vCPUs"),
        (["--jobs", "0"], "0 is not 1 or more"),
        (["--boots", "five"], "five is not 1 or more"),
        (["--deadline", "-1"], "no number of seconds"),
        (["--report-only"], "there is nothing in"),
        (["--host-kernel", "/no/bzImage"], "cannot read the kernel /no/bzImage: No such file or directory"),
    ],
)
def test_what_makes_no_sense_is_one_line(
    argv: list[str], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "--out", str(tmp_path), *argv]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert why in said[-1]
    assert said[-1].startswith("offmap compare: ")


def test_the_report_of_a_run_has_the_rows_of_earlier_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    earlier = CellResult(spec=CellSpec("anon"), outcome=CellOutcome.OOPS, reason="as it was")
    with Store(tmp_path) as store:
        store.put(earlier)
    (tmp_path / "cells/damaged.json").write_text("{")
    now = CellResult(spec=CellSpec("memfd", "debian:6.1"), outcome=CellOutcome.REFUSED, reason="now")
    assert compare._beside_others([now], tmp_path) == [earlier, now]
    again = CellResult(spec=CellSpec("anon"), outcome=CellOutcome.REFUSED, reason="again")
    assert compare._beside_others([again], tmp_path) == [again]
    assert "damaged.json is left out" in caplog.text


def test_as_many_boots_are_timed_as_a_ratio_needs() -> None:
    assert compare.BOOTS == MIN_PAIRS
