"""Real cells of the comparison, measured in disposable hosts of their own: what is known of each kind must come out."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from offmap.compare.cell_result import CellOutcome, CellResult
from offmap.compare.cell_run import CellTask, run_cell
from offmap.compare.job import FULL
from offmap.compare.questions import CATALOGUE, Kind
from offmap.compare.spec import CellSpec
from offmap.compare.store import read_cell

EXAMPLE = Path(__file__).parents[2] / "examples" / "small_matrix.py"

pytestmark = [pytest.mark.lab, pytest.mark.slow]

COMMON = {
    "works.boot": True,
    "works.smp": True,
    "works.virtio_blk": True,
    "works.virtio_net": True,
    "works.vhost_net": True,
    "works.vsock": True,
    "works.ram_snapshot": True,
    "hidden.control": True,
    "hidden.restored": True,
    "hidden.canaries_planted": FULL.canaries,
    "breaks.drop_caches": True,
    "breaks.compaction": True,
    "breaks.memory_pressure": True,
}
PLAIN = {
    "works.kvm_clock": True,
    "works.balloon": True,
    "hidden.before_io": False,
    "hidden.attack": False,
    "hidden.after_io": False,
    "hidden.canaries_found": FULL.canaries,
    "breaks.o_direct": True,
    "breaks.process_vm_readv": True,
    "breaks.ptrace": True,
    "breaks.core_dump": True,
}
HIDDEN = {
    "works.kvm_clock": False,
    "works.balloon": False,
    "hidden.before_io": True,
    "hidden.after_io": True,
    "hidden.direct_map_pages": 0,
    "hidden.alias_pages": 0,
    "hidden.canaries_found": 0,
    "hidden.canaries_found_after_io": 0,
    "hidden.zeroed": True,
    "breaks.o_direct": False,
    "breaks.process_vm_readv": False,
    "breaks.core_dump": False,
}
EXPECTED: dict[str, dict[str, Any]] = {
    "memfd": COMMON | PLAIN,
    # /dev/mem has an access method of its own (generic_access_phys), by which a debugger reads what GUP refuses.
    "reserved": COMMON | HIDDEN | {"hidden.attack": True, "breaks.ptrace": True, "costs.direct_map_split": 0},
    "secretmem-bridge": COMMON | HIDDEN | {"breaks.ptrace": False, "breaks.hibernation": False},
    "unplugged": COMMON
    | HIDDEN
    | {"hidden.attack": True, "breaks.ptrace": False, "costs.direct_map_split": 0, "costs.direct_map_left": 0},
}


def check(result: CellResult) -> None:
    expected = EXPECTED[result.spec.backend]
    assert result.outcome is CellOutcome.BOOTED, (result.reason, result.console)
    values = {id: result.answer(id).value for id in expected}
    assert values == expected, {id: result.answer(id) for id in expected if values[id] != expected[id]}
    # Every question was put, and has an answer or a reason.
    assert set(result.answered) == set(CATALOGUE)
    for id, answer in result.answered.items():
        assert answer.value is not None or answer.reason, id
    pairs = [id for id, answer in result.answered.items() if answer.ratio is not None]
    assert {"costs.populate", "costs.chase", "costs.copy", "costs.blk_read", "costs.blk_write", "costs.net"} <= set(
        pairs
    )
    assert all(CATALOGUE[id].kind is Kind.NUMBER for id in pairs)


@pytest.mark.timeout(1200)
def test_hidden_cells_of_an_example(tmp_path: Path) -> None:
    """It does what it says, too: prints a line for each kind and a winner, and measures nothing twice."""
    argv = [sys.executable, str(EXAMPLE), "debian:6.12", str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *kinds, winner = done.stdout.splitlines()
    assert [line.split()[0] for line in kinds] == ["reserved", "unplugged", "secretmem-bridge"]
    assert winner in {"winner: unplugged", "winner: reserved"}
    cells = sorted((tmp_path / "cells").glob("*.json"))
    assert len(cells) == 3
    for cell in cells:
        check(read_cell(cell))
    again = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert again.stdout == done.stdout


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_an_exposed_cell() -> None:
    check(run_cell(CellTask(CellSpec("memfd"), "test-memfd")))


@pytest.mark.timeout(300)
def test_a_clock_that_the_host_cannot_keep_costs_that_cell_its_host() -> None:
    result = run_cell(CellTask(CellSpec("secretmem-bridge", kvm_clock="on"), "test-clock"))
    assert result.outcome is CellOutcome.OOPS
    assert result.asked == "works.kvm_clock"
    assert "BUG: unable to handle page fault" in result.oops
