"""The output folder of a comparison: one file per cell, written whole or not at all. Only one comparison may use it."""

import fcntl
import os
from pathlib import Path

from offmap.compare.cell_result import CellOutcome, CellResult
from offmap.compare.inputs import difference
from offmap.compare.spec import CellSpec
from offmap.errors import OffmapError
from offmap.lab.cache import write_atomically
from offmap.owned import Owned


def read_cell(path: Path) -> CellResult:
    """One cell's file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
        OffmapError: it cannot be read.
    """
    try:
        return CellResult.loads(path.read_bytes())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OffmapError(f"cannot read {path}: {error.strerror}", "check the rights of the output folder") from None


class Store(Owned):
    """An output folder that no other comparison writes to; a context manager that releases it.

    Args:
        out: the folder, made if it does not exist.

    Raises:
        OffmapError: it cannot be written to, or another comparison uses it.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.cells = out / "cells"
        self._ended: set[str] = set()
        try:
            self.cells.mkdir(parents=True, exist_ok=True)
            self._lock = (out / ".lock").open("a+")
        except OSError as error:
            raise OffmapError(f"cannot write to {out}: {error.strerror}", "give another folder with --out") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            who = self._lock.read().strip() or "another one"
            self._lock.close()
            raise OffmapError(
                f"an offmap compare is running in {out} (process {who})", "wait for it, or give another --out"
            ) from None
        try:
            for leftover in self.cells.glob(".*.json.*"):  # of a comparison that was killed while it wrote
                leftover.unlink()
            self._lock.truncate(0)
            self._lock.write(f"{os.getpid()}\n")
            self._lock.flush()
        except OSError as error:
            self._lock.close()
            raise OffmapError(f"cannot write to {out}: {error.strerror}", "make room, or give another --out") from None

    def path(self, spec: CellSpec) -> Path:
        """The file of a cell."""
        return self.cells / f"{spec.key}.json"

    def done(
        self, spec: CellSpec, inputs: dict[str, str], deadline: float, boots: int = 1
    ) -> tuple[CellResult | None, str]:
        """The usable result of an earlier run; or None, and why the cell is run again (empty if it never ran).

        A result is usable if it is whole and of the same code and kernels. A cell is run again if it failed, ran out of
        a shorter time than it has now, or timed fewer boots.
        """
        try:
            found = read_cell(self.path(spec))
        except FileNotFoundError:
            return None, ""
        except ValueError as error:
            return None, f"its file is damaged ({error})"
        if found.spec != spec:
            return None, "its file is of another cell"
        if changed := difference(found.inputs, inputs):
            return None, f"{changed} changed since"
        if found.outcome is CellOutcome.FAILED:
            return None, f"it failed: {found.reason.splitlines()[0] if found.reason else 'no reason'}"
        if found.outcome is CellOutcome.DEADLINE and _number(found.inputs.get("deadline", "")) < deadline:
            return None, "it may take longer now"
        if found.outcome is CellOutcome.BOOTED and _number(found.inputs.get("boots", "1")) < boots:
            return None, f"{boots} boots are timed now"
        return found, ""

    def put(self, result: CellResult) -> None:
        """Write the result of a cell.

        Raises:
            OffmapError: it cannot be written.
            ValueError: this comparison has already written it.
        """
        key = result.spec.key
        if key in self._ended:
            raise ValueError(f"cell {key} ended twice")
        try:
            write_atomically(self.path(result.spec), result.dumps())
            self.path(result.spec).chmod(0o644)  # a result, for whoever reads it
        except OSError as error:
            raise OffmapError(
                f"cannot write {self.path(result.spec)}: {error.strerror}",
                "make room and run it again: what is done is kept",
            ) from None
        self._ended.add(key)

    def close(self) -> None:
        """Release the folder."""
        self._lock.close()


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
