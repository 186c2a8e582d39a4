"""Errors and progress on standard error: lines for people as they were, JSON for services, and no cost unheard."""

import datetime
import json
import logging
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from offmap.cli.log import LogOptions, logging_to_stderr, split
from offmap.cli.main import main
from offmap.errors import BackendRefused, ExitStatus, OffmapError
from offmap.log import Logger

JSON = LogOptions(log_format="json")


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[BaseException]]:
    """Give a list whose last exception is what `offmap run` ends in."""
    errors: list[BaseException] = []

    def run(_: object) -> int:
        raise errors[-1]

    monkeypatch.setattr("offmap.cli.run.run", run)
    yield errors
    assert not logging.getLogger("offmap").level, "logging is left as it was found"


def records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    "words",
    [
        ["--log-format", "json", "run", "--kernel", "k"],
        ["--log-format=json", "run", "--kernel", "k"],
        ["run", "--kernel", "k", "--log-format", "json"],
        ["run", "-v", "--log-format=json", "--kernel", "k"],
    ],
)
def test_an_error_is_an_object_with_its_parts(
    words: list[str], fails: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    fails.append(BackendRefused("no such memory", "it is not there", "use another"))
    assert main(words) == ExitStatus.FAILED
    (record,) = records(capsys.readouterr().err)
    when = datetime.datetime.fromisoformat(record.pop("time"))
    assert abs(datetime.datetime.now(datetime.UTC) - when) < datetime.timedelta(minutes=5)
    assert record == {
        "level": "error",
        "logger": "offmap.cli.run",
        "message": "refused: no such memory: it is not there; use another",
        "error": "BackendRefused",
        "what": "no such memory",
        "why": "it is not there",
        "remedy": "use another",
        "exit_status": 2,
    }


@pytest.mark.parametrize(
    "words",
    [
        ["--log-format", "json", "fly"],
        ["run", "--fly", "--log-format", "json"],
        ["run", "--vcpus", "x", "--log-format", "json"],
        ["lab", "exec", "--nodes", "x", "--log-format", "json", "--", "true"],
        ["lab", "exec", "--log-format", "json"],
        ["lab", "--log-format", "json", "exec"],
    ],
    ids=" ".join,
)
def test_wrong_use_is_an_object_too(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == ExitStatus.FAILED
    said = capsys.readouterr()
    (record,) = records(said.err)
    assert record["level"] == "error" and record["remedy"] and said.out == ""


def test_a_bug_is_an_object_with_its_traceback(fails: list[BaseException], capsys: pytest.CaptureFixture[str]) -> None:
    fails.append(ZeroDivisionError("by nothing"))
    assert main(["run", "--kernel", "k", "--log-format", "json"]) == ExitStatus.FAILED
    (record,) = records(capsys.readouterr().err)
    assert record["traceback"].startswith("Traceback") and record["traceback"].endswith("by nothing")


def test_a_format_that_is_none_is_one_line_of_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--log-format", "xml"]) == ExitStatus.FAILED
    assert capsys.readouterr().err.startswith("offmap run: argument --log-format: invalid choice: 'xml'")


@pytest.mark.parametrize(
    ("words", "command", "options"),
    [
        ([], None, LogOptions()),
        (["--help"], None, LogOptions()),
        (["-v", "run", "--kernel", "k"], "run", LogOptions(verbose=True)),
        (["--log-format", "json", "run"], "run", JSON),
        (["lab", "exec", "--", "true", "-v", "--log-format=json"], "lab", LogOptions()),
        (["--log-format", "xml", "run"], None, LogOptions()),
    ],
)
def test_what_is_known_before_a_command_line_is_parsed(
    words: list[str], command: str | None, options: LogOptions
) -> None:
    found, so_far = split(words)
    assert vars(so_far) == vars(options)
    assert found == command or "xml" in words


def test_a_command_in_a_disposable_host_keeps_its_own_options(monkeypatch: pytest.MonkeyPatch) -> None:
    from offmap.cli import lab

    seen: list[list[str]] = []

    def run_exec(args: Any) -> int:
        seen.append(args.command)
        Logger("offmap.cli").debug("heard by nobody, as -v is the command's")
        return 0

    monkeypatch.setattr(lab, "run_exec", run_exec)
    assert main(["lab", "exec", "uname", "-v", "--log-format", "json"]) == 0
    assert seen == [["uname", "-v", "--log-format", "json"]]


def test_lines_are_those_of_their_command_and_debug_names_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to_stderr("offmap compare", LogOptions(verbose=True)):
        Logger("offmap.cli.image.build").info("getting 100% of it")
        Logger("offmap.cli").warning("%d of them", 3)
        Logger("offmap.lab.build").info("configuring")
        Logger("offmap.lab.qemu").debug("%s -m %d", "qemu", 5)
    assert capsys.readouterr().err.splitlines() == [
        "offmap image build: getting 100% of it",
        "offmap: 3 of them",
        "offmap compare: configuring",
        "offmap compare: offmap.lab.qemu: qemu -m 5",
    ]


def test_debug_is_only_for_who_asks(capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to_stderr("offmap run", JSON):
        Logger("offmap.lab").debug("unheard")
        Logger("offmap.lab").info("heard")
        logging.getLogger("another.library").info("unheard")
        logging.getLogger("another.library").warning("heard")
        warnings.warn("heard", stacklevel=1)
    said = records(capsys.readouterr().err)
    assert [(record["logger"], record["level"]) for record in said] == [
        ("offmap.lab", "info"),
        ("another.library", "warning"),
        ("py.warnings", "warning"),
    ]


def test_records_of_many_threads_are_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to_stderr("offmap run", LogOptions()):
        logger = Logger("offmap.cli.run")
        threads = [threading.Thread(target=logger.info, args=(f"line {n}",)) for n in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    said = capsys.readouterr().err.splitlines()
    assert sorted(said) == sorted(f"offmap run: line {n}" for n in range(16))


def test_an_unwritable_standard_error_is_no_reason_to_fail(fails: list[BaseException]) -> None:
    fails.append(OffmapError("it failed"))
    with suppress(OSError), Path("/dev/full").open("w") as full, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", full)
        assert main(["run", "--kernel", "k"]) == ExitStatus.FAILED


def test_nothing_is_imported_before_something_is_said() -> None:
    program = (
        "import sys; from offmap.cli.main import main; import offmap.cli.run\n"
        "offmap.cli.run.run = lambda args: 0\n"
        "assert main(['run', '--kernel', 'k']) == 0\n"
        "from offmap.log import Logger; Logger('offmap.lab').info('to nobody')\n"
        "sys.exit('logging' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_process_without_fds_says_so(tmp_path: Path) -> None:
    program = (
        "import os, resource, sys; from offmap.cli.main import main; import offmap.cli.run\n"
        "def run(args):\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3)); os.open('/dev/null', 0)\n"
        "offmap.cli.run.run = run\n"
        "sys.exit(main(['run', '--kernel', 'k']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "offmap run: this process may open no more files; raise its limit (ulimit -n)\n"


def test_a_library_user_hears_records_by_logging_alone(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "offmap"):
        Logger("offmap.vmm").debug("%d vCPUs", 2)
    assert [(r.name, r.getMessage()) for r in caplog.records] == [("offmap.vmm", "2 vCPUs")]
    assert caplog.records[0].funcName == "test_a_library_user_hears_records_by_logging_alone"
