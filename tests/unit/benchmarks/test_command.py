"""What the benchmarks' command lines have in common."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from offmap.errors import ExitStatus, OffmapError, Undetermined


def test_rounds_and_quick(benchmark_module: Callable[[str], ModuleType]) -> None:
    parser = benchmark_module("command").benchmark_parser("What it measures.", rounds=7, quick="1 round")
    assert vars(parser.parse_args([])) == {"rounds": 7, "quick": False}
    assert vars(parser.parse_args(["--quick", "--rounds", "2"])) == {"rounds": 2, "quick": True}


def test_what_run_in_lab_says_is_understood_and_hidden(benchmark_module: Callable[[str], ModuleType]) -> None:
    parser = benchmark_module("command").benchmark_parser(None, rounds=1, quick="")
    benchmark_module("lab_runs").add_inside_options(parser, "--peer")
    args = parser.parse_args(["--inside", "--guest-kernel", "k", "--guest-initrd", "i", "--peer", "p"])
    assert (args.inside, args.guest_kernel, args.guest_initrd, args.peer) == (True, "k", "i", "p")
    assert parser.parse_args([]).inside is False
    assert "guest" not in parser.format_help() and "peer" not in parser.format_help()


def test_what_could_not_be_done_is_one_line(
    benchmark_module: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(error: OffmapError) -> int:
        raise error

    exit_status = benchmark_module("command").exit_status
    assert exit_status("walk", lambda: 7) == 7
    assert exit_status("walk", lambda: refuse(OffmapError("it broke", "mend it"))) == ExitStatus.FAILED
    assert exit_status("walk", lambda: refuse(Undetermined("no kcore"))) == ExitStatus.UNDETERMINED
    assert capsys.readouterr().err == "walk: it broke; mend it\nwalk: no kcore\n"


def test_no_compiler_is_said_with_the_remedy(
    benchmark_module: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OffmapError, match=r"cannot compile peer\.c: .*install gcc"):
        benchmark_module("c_program").compile_program(tmp_path / "peer.c", tmp_path)
