"""The command line as a user meets it: one line for each thing that is wrong, and the exit status that says how."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from offmap.cli.main import main
from offmap.errors import BackendRefused, ExitStatus, KernelError, OffmapError, Undetermined
from offmap.patience import scaled

OFFMAP = (sys.executable, "-m", "offmap")


def run(*words: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, *OFFMAP, *words],
        capture_output=True,
        text=True,
        timeout=scaled(60),
        check=False,
        stdin=subprocess.DEVNULL,
    )


def wrong(*words: str, status: int = 2, prefix: tuple[str, ...] = ()) -> str:
    """A command that must end in one line on standard error."""
    done = run(*words, prefix=prefix)
    assert (done.returncode, done.stdout) == (status, ""), (done.stdout, done.stderr)
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.endswith("\n")
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.fixture
def kernel(tmp_path: Path) -> str:
    """Give a file that is no kernel."""
    path = tmp_path / "kernel"
    path.write_bytes(b"\0" * 4096)
    return str(path)


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("fly",),
        ("--fly",),
        ("run",),
        ("run", "--kernel"),
        ("run", "--kernel", "k", "--vcpus", "two"),
        ("run", "--kernel", "k", "--kvm-clock", "maybe"),
        ("run", "--kernel", "k", "--fly"),
        ("run", "--kernel", "k", "extra"),
        ("audit",),
        ("audit", "self"),
        ("demo", "--accel", "magic"),
        ("lab",),
        ("lab", "fly"),
    ],
    ids=" ".join,
)
def test_wrong_use_is_one_line_that_names_the_help(words: tuple[str, ...]) -> None:
    assert "--help" in wrong(*words)


def test_failures_of_exec_are_told_apart_from_its_commands() -> None:
    assert "see offmap" in wrong("run", "--exec", "true", "--fly", status=125)
    assert "there is no image nonesuch" in wrong("run", "--image", "nonesuch", "--exec=true", status=125)
    assert "leave out --console" in wrong("run", "--exec", "true", "--console", "virtio", status=125)
    assert "of its own" in wrong("run", "--image", "x", "--kernel", "k", status=2)
    assert "rw is on or off" in wrong("run", "--image", "x,rw=maybe")
    assert run("run", "--exec", "true", "--help").returncode == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--memory", "swap"), "there is no memory backend 'swap'; choose one of anon"),
        (("--memory", "anon,fast=1"), "there is no option 'fast=1'"),
        (("--memory", "reserved,base=1"), "not the address of a page"),
        (("--memory-size", "0"), "a guest cannot have 0 B of RAM"),
        (("--memory-size", "lots"), "'lots' is not a size"),
        (("--memory-size", "-1"), "'-1' is not a size"),
        (("--memory-size", "4097"), "a whole number of pages"),
        (("--memory-size", "9" * 5000), "is not a size"),
        (("--memory-size", "2P"), "a guest cannot have 2 PiB of RAM"),
        (("--vcpus", "0"), "a guest cannot have 0 vCPUs"),
        (("--vcpus", "17"), "ask for 1 to 16"),
        (("--memory", "reserved", "--kvm-clock", "on"), "kvm-clock cannot be offered on reserved memory"),
        ((), "is neither a bzImage nor an ELF file"),
    ],
)
def test_what_run_is_asked_for_wrongly(kernel: str, options: tuple[str, ...], message: str) -> None:
    assert message in wrong("run", "--kernel", kernel, *options)


def test_kernels_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    os.mkfifo(tmp_path / "fifo")
    for name, message in (
        ("none", "No such file"),
        ("empty", "is empty"),
        (".", "Is a directory"),
        ("fifo", "bzImage"),
    ):
        assert message in wrong("run", "--kernel", str(tmp_path / name))


def test_initrd_that_is_none(tmp_path: Path) -> None:
    # A kernel that passes the first look.
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"\x7fELF" + bytes(4096))
    (tmp_path / "initrd").write_bytes(b"")
    os.truncate(tmp_path / "initrd", 1 << 30)
    text = wrong("run", "--kernel", str(kernel), "--initrd", str(tmp_path / "initrd"))
    assert "(1 GiB) is larger than the guest's RAM (256 MiB); give the guest more with --memory-size" in text
    assert "No such file" in wrong("run", "--kernel", str(kernel), "--initrd", str(tmp_path / "none"))


@pytest.mark.parametrize("which", ["<&-", ">&-", "<&- >&-"])
def test_closed_streams_are_refused(kernel: str, which: str) -> None:
    for words in (("run", "--kernel", kernel), ("--version",)):
        text = wrong(*words, prefix=("sh", "-c", f'exec "$@" {which}', "sh"))
        assert "a standard stream is closed" in text


def test_closed_standard_error_is_refused_in_silence(kernel: str) -> None:
    done = run("run", "--kernel", kernel, prefix=("sh", "-c", 'exec "$@" 2>&-', "sh"))
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_help_and_version() -> None:
    done = run("--help")
    assert done.returncode == 0
    for command in ("run", "audit", "lab", "demo"):
        assert f"\n  {command} " in done.stdout or f"    {command} " in done.stdout
    assert "3 cannot be determined" in " ".join(done.stdout.split())
    assert run("--version").stdout.startswith("offmap ")
    assert "--memory" in run("run", "--help").stdout
    selftests = " ".join(run("lab", "selftests", "--help").stdout.split())
    assert "(default: the newest patched kernel)" in selftests
    assert "--modules" not in selftests  # it goes with a bzImage, whose source is not known


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    for words in ("--help", "run --help"):
        done = run(*words.split(), prefix=("sh", "-c", '"$@" | true; exit 0', "sh"))
        assert "Traceback" not in done.stderr


def test_no_kvm_is_one_line(kernel: str, tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("no /dev/kvm was not tested: making a mount namespace needs root")
    guest = tmp_path / "guest"
    guest.write_bytes(b"\x7fELF" + bytes(4096))
    hide = 'mount -t tmpfs none /dev && : >/dev/null && exec "$@"'
    if subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no /dev/kvm was not tested: this root may not make a mount namespace")
    text = wrong("run", "--kernel", str(guest), prefix=("unshare", "-m", "sh", "-c", hide, "sh"))
    assert "open of /dev/kvm failed: No such file or directory (ENOENT); load kvm_intel or kvm_amd" in text


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (OffmapError("it failed", "try again"), 2, "offmap run: it failed; try again\n"),
        (BackendRefused("no memory", "none", "buy it"), 2, "offmap run: refused: no memory: none; buy it\n"),
        (Undetermined("nobody knows"), 3, "offmap run: nobody knows\n"),
        (KernelError("KVM_RUN", 14), 2, "offmap run: KVM_RUN failed: Bad address (EFAULT)\n"),
        (KernelError("KVM_RUN", OSError(12345, "?")), 2, "offmap run: KVM_RUN failed: Unknown error 12345 (12345)\n"),
        (KeyboardInterrupt(), 2, "offmap run: interrupted\n"),
    ],
)
def test_errors_become_one_line_and_a_status(
    error: BaseException, status: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import offmap.cli.run

    def fails(_: object) -> int:
        raise error

    monkeypatch.setattr(offmap.cli.run, "run", fails)
    assert main(["run", "--kernel", "k"]) == status
    assert capsys.readouterr().err == text


def test_a_full_disk_behind_the_output_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        argv = [sys.executable, "-m", "offmap", "doctor", "--json"]
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("cannot write the output: No space left on device; make room")
    assert "Traceback" not in done.stderr


def test_a_process_without_fds_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(_: str) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("offmap.cli.main.import_module", full)
    assert main(["run"]) == ExitStatus.FAILED
    error = capsys.readouterr().err
    assert error == "offmap run: this process may open no more files; raise its limit (ulimit -n)\n"


def test_an_interrupt_while_a_command_is_imported_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("offmap.cli.main.import_module", interrupted)
    assert main(["run"]) == ExitStatus.FAILED
    assert capsys.readouterr().err == "offmap run: interrupted\n"


def test_bugs_keep_their_traceback_and_never_say_exposed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import offmap.cli.run

    def fails(_: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(offmap.cli.run, "run", fails)
    assert main(["run", "--kernel", "k"]) == ExitStatus.FAILED
    assert "Traceback" in capsys.readouterr().err


def test_statuses_are_what_the_design_says() -> None:
    assert [int(status) for status in ExitStatus] == [0, 1, 2, 3, 125]
    assert [status.name for status in ExitStatus] == ["DONE", "EXPOSED", "FAILED", "UNDETERMINED", "NOT_RUN"]
