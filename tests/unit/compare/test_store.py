"""What is kept of cells, what counts, and who may write."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from offmap.compare.cell_result import CellOutcome, CellResult
from offmap.compare.facts import Host
from offmap.compare.questions import Answer
from offmap.compare.spec import CellSpec
from offmap.compare.store import Store, read_cell
from offmap.errors import OffmapError
from offmap.patience import scaled

SPEC = CellSpec("unplugged")
INPUTS = {"code": "c", "host_kernel": "h", "host_release": "6.12", "guest_kernel": "g", "guest_release": "6.12"}


def result(outcome: CellOutcome = CellOutcome.BOOTED, deadline: float = 600, reason: str = "") -> CellResult:
    return CellResult(
        spec=SPEC,
        outcome=outcome,
        reason=reason,
        answers=(Answer("costs.boot", 1.25, samples=(1.0, 1.5), detail="ünïcode\n"),),
        host=Host("6.12"),
        inputs={**INPUTS, "deadline": f"{deadline:g}"},
        seconds=12.5,
    )


@pytest.mark.parametrize("outcome", [CellOutcome.BOOTED, CellOutcome.REFUSED, CellOutcome.OOPS])
def test_what_came_to_a_result_is_done(tmp_path: Path, outcome: CellOutcome) -> None:
    with Store(tmp_path) as store:
        assert store.done(SPEC, INPUTS, 600) == (None, "")
        store.put(result(outcome))
    with Store(tmp_path) as store:
        assert store.done(SPEC, INPUTS, 600) == (result(outcome), "")
        assert store.done(CellSpec("anon"), INPUTS, 600) == (None, "")


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        (["code"], "the code changed since"),
        (["host_kernel"], "the host kernel changed since"),
        (["host_kernel", "host_release", "code"], "the code and the host kernel changed since"),
        (["guest_release"], "the guest kernel changed since"),
    ],
)
def test_with_other_code_or_kernels_it_is_another_measurement(tmp_path: Path, changed: list[str], why: str) -> None:
    with Store(tmp_path) as store:
        store.put(result())
        assert store.done(SPEC, {**INPUTS, **dict.fromkeys(changed, "new")}, 600) == (None, why)


def test_failures_are_tried_again_and_deadlines_with_more_time(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.put(result(CellOutcome.FAILED, reason="it broke\nbadly"))
        assert store.done(SPEC, INPUTS, 600) == (None, "it failed: it broke")
    with Store(tmp_path) as store:
        store.put(result(CellOutcome.DEADLINE, deadline=600))
        assert store.done(SPEC, INPUTS, 600)[0] is not None
        assert store.done(SPEC, INPUTS, 601) == (None, "it may take longer now")


def test_with_more_boots_to_time_it_is_run_again(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.put(result())
        assert store.done(SPEC, INPUTS, 600, 5) == (None, "5 boots are timed now")
    with Store(tmp_path) as store:
        store.put(result(CellOutcome.REFUSED))  # with any number
        assert store.done(SPEC, INPUTS, 600, 5)[0] is not None


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-100],
        lambda data: b"\0" * len(data),
        lambda data: data.replace(b"1.25", b"1.26"),
        lambda data: data.replace(b'"booted"', b'"refused"'),
        lambda data: data.replace(b"cell/1", b"cell/2"),
        lambda data: b"[]\n",
        lambda data: b"\xff" + data,
    ],
)
def test_a_damaged_file_is_not_trusted(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    with Store(tmp_path) as store:
        store.put(result())
        path = store.path(SPEC)
        path.write_bytes(damage(path.read_bytes()))
        found, why = store.done(SPEC, INPUTS, 600)
    assert found is None
    assert why.startswith("its file is damaged (") and "\n" not in why


def test_a_file_of_another_cell_is_not_taken_for_it(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.put(result())
        store.path(SPEC).rename(store.path(CellSpec("anon")))
        assert store.done(CellSpec("anon"), INPUTS, 600) == (None, "its file is of another cell")


def test_a_cell_ends_once(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.put(result())
        with pytest.raises(ValueError, match="ended twice"):
            store.put(result())


def test_one_comparison_at_a_time(tmp_path: Path) -> None:
    with Store(tmp_path):
        with pytest.raises(OffmapError, match=f"is running in .* \\(process {os.getpid()}\\); wait for it") as caught:
            Store(tmp_path)
        assert "\n" not in str(caught.value)
    with Store(tmp_path):
        pass


def test_a_killed_writer_leaves_nothing_that_counts(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    leftover = tmp_path / "cells" / f".{SPEC.key}.json.abc123"
    leftover.write_text("{")
    with Store(tmp_path) as store:
        assert not leftover.exists()
        assert store.done(SPEC, INPUTS, 600) == (None, "")


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OffmapError, match=r"cannot write to .*; give another folder with --out"):
        Store(tmp_path / "file")


FULL = """
import resource, sys
from pathlib import Path
from offmap.compare.cell_result import CellOutcome, CellResult
from offmap.compare.spec import CellSpec
from offmap.compare.store import Store
from offmap.errors import OffmapError
with Store(Path(sys.argv[1])) as store:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        store.put(CellResult(spec=CellSpec("anon"), outcome=CellOutcome.OOPS, oops="x" * 5000))
    except OffmapError as error:
        print(error)
"""


def test_a_disk_without_room_leaves_no_half_file(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True, timeout=scaled(60)
    )
    assert "File too large; make room and run it again: what is done is kept" in done.stdout
    assert list((tmp_path / "cells").iterdir()) == []


def test_reading_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_cell(tmp_path / "none.json")
    with pytest.raises(OffmapError, match="cannot read"):
        read_cell(tmp_path)


def test_what_was_not_measured_has_a_reason() -> None:
    oops = CellResult(spec=SPEC, outcome=CellOutcome.OOPS, reason="BUG: at 0x0")
    assert oops.answer("works.vsock") == Answer("works.vsock", None, "oops: BUG: at 0x0")
    assert result().answer("works.vsock") == Answer("works.vsock", None, "not asked")
    assert result().answer("costs.boot").value == 1.25
    with pytest.raises(KeyError):
        oops.answer("no.such")
    assert oops.emulated  # nobody says that it was not
