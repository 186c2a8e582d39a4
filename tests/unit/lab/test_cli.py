"""``offmap lab exec``: what it makes of its command line, without a host."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from offmap.cli import lab
from offmap.cli.main import main
from offmap.lab import host, provision
from offmap.lab.errors import LabPanic
from offmap.lab.kernel import HostKernel

KERNEL = HostKernel("test", "6.12.1", Path("/k"), Path("/m"))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Put a host in place that only notes what was asked of it."""
    seen: dict[str, Any] = {}

    @contextmanager
    def start(_kernel: HostKernel, **options: Any) -> Iterator[SimpleNamespace]:
        seen.update(options)
        yield SimpleNamespace(release="6.12.1", options=SimpleNamespace(accel="tcg"))

    def run(_host: object, argv: list[str], deadline: float | None) -> int:
        seen.update(argv=argv, deadline=deadline)
        return 5

    def kernel(spec: str | None, modules: Path | None, _say: object = None) -> HostKernel:
        seen.update(spec=spec, modules=modules)
        return KERNEL

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(host.LabHost, "start", start)
    monkeypatch.setattr(provision, "host_kernel", kernel)
    monkeypatch.setattr(lab, "_run", run)
    return seen


def test_defaults(started: dict[str, Any], tmp_path: Path) -> None:
    assert main(["lab", "exec", "--", "sh", "-c", "exit 5", "--", "--out"]) == 5
    assert started["argv"] == ["sh", "-c", "exit 5", "--", "--out"]
    assert (started["memory"], started["accel"], started["cmdline"]) == ("2G", "auto", "")
    assert (started["spec"], started["deadline"]) == (None, None)
    assert (tmp_path / started["out"]).is_dir()


def test_options(started: dict[str, Any], tmp_path: Path) -> None:
    options = ["--host-kernel", "/k", "--modules", "/m", "--memory", "4G", "--host-cmdline", "memmap=256M$0x60000000"]
    options += ["--accel", "tcg", "--timeout", "9", "--out", str(tmp_path / "o"), "--console", str(tmp_path / "c")]
    assert main(["lab", "exec", *options, "true"]) == 5
    assert started["argv"] == ["true"]
    assert (started["spec"], started["modules"]) == ("/k", Path("/m"))
    assert (started["memory"], started["accel"], started["cmdline"]) == ("4G", "tcg", "memmap=256M$0x60000000")
    assert started["timeout"] == 9
    assert (tmp_path / "c").exists()


@pytest.mark.parametrize("timeout", ["0", "-1", "x", "nan", "inf"])
def test_bad_deadline(started: dict[str, Any], timeout: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "exec", f"--timeout={timeout}", "--", "true"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_no_command(started: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "exec"]) == 2
    assert "no command to run" in capsys.readouterr().err


def test_our_own_failure_is_one_line_and_status_2(
    started: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: object) -> int:
        raise LabPanic("[1] BUG: unable to handle page fault\n[2] more\n")

    monkeypatch.setattr(lab, "_run", run)
    assert main(["lab", "exec", "--", "true"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the lab host's kernel panicked: [1] BUG: unable" in line
