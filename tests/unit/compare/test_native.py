"""Measuring here: the program, its end, and that nothing of it is left."""

import os
import select
import shutil
import sys
import threading
import time

import pytest

from offmap.compare import native
from offmap.compare.running import CellStopped, RunningCell, running_cell, stop_cells
from offmap.compare.spec import NATIVE, CellSpec
from offmap.errors import OffmapError
from offmap.lab.errors import LabTimeout
from offmap.patience import scaled


def run(script: str, seconds: float = 30, cell: RunningCell | None = None) -> tuple[int, str, bytes]:
    heard = bytearray()
    argv = [sys.executable, "-c", script, "{}"]
    status, errors = native.run_here(argv, heard.extend, cell or RunningCell("test"), seconds)
    return status, errors, bytes(heard)


def gone(pid: int) -> bool:
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([process], [], [], scaled(10))[0])  # readable once it has ended: pidfd_open(2)
    finally:
        os.close(process)


CHILD = (
    "import os, subprocess, sys, time; "
    "child = subprocess.Popen(['sleep', '600'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL); "
    "print(child.pid, flush=True); "
)


def test_status_output_and_last_words() -> None:
    script = "import sys; print('a'); [print(n, file=sys.stderr) for n in range(99)]; sys.exit(3)"
    status, errors, heard = run(script)
    assert (status, heard) == (3, b"a\n")
    assert errors.splitlines()[-1] == "98" and len(errors.splitlines()) == 20


def test_a_signal_is_a_status() -> None:
    assert run("import os; os.kill(os.getpid(), 9)")[0] == 128 + 9


def test_what_it_leaves_behind_is_ended() -> None:
    status, _, heard = run(CHILD)
    assert status == 0
    assert gone(int(heard))


def test_it_is_ended_at_the_deadline_with_all_that_it_started() -> None:
    heard = bytearray()
    argv = [sys.executable, "-c", CHILD + "time.sleep(600)", "{}"]
    with pytest.raises(LabTimeout, match=r"did not end in 0\.5 s"):
        native.run_here(argv, heard.extend, RunningCell("test"), 0.5)
    assert gone(int(heard or b"999999999"))


def test_one_that_does_not_end_when_asked_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "TERM_GRACE", 0.2)
    began = time.monotonic()
    with pytest.raises(LabTimeout):
        run("import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(600)", 1)
    assert time.monotonic() - began < scaled(20)


def test_it_is_ended_with_its_comparison() -> None:
    heard = bytearray()
    begun = threading.Event()

    def feed(data: bytes) -> None:
        heard.extend(data)
        if heard.endswith(b"\n"):
            begun.set()

    def stop() -> None:
        begun.wait(scaled(20))
        stop_cells("ended early")

    stopper = threading.Thread(target=stop)
    stopper.start()
    with running_cell("ended early") as cell, pytest.raises(CellStopped):
        native.run_here([sys.executable, "-c", CHILD + "time.sleep(600)", "{}"], feed, cell, 60)
    stopper.join()
    assert gone(int(heard))


def test_what_cannot_be_started_is_one_line() -> None:
    if shutil.which("setpriv"):
        status, errors = native.run_here(["/no/such/program"], lambda _: None, RunningCell("test"), 5)
        assert status != 0 and "/no/such/program" in errors
    else:
        with pytest.raises(OffmapError, match="cannot start /no/such/program"):
            native.run_here(["/no/such/program"], lambda _: None, RunningCell("test"), 5)


def test_who_may_and_with_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "needs root" in native.refusal_here(CellSpec("anon", NATIVE))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(native, "loaded_module", lambda: None)
    assert native.refusal_here(CellSpec("anon", NATIVE)) == ""
    for backend in ("unplugged", "secretmem-bridge", "qemu-unplugged"):
        why = native.refusal_here(CellSpec(backend, NATIVE))
        assert why.startswith(f"{backend} needs the offmap module") and "offmap module load" in why
