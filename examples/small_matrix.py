"""Measure three kinds of RAM on one kernel in disposable hosts, and print the one that hides and is had soonest.

    python examples/small_matrix.py debian:6.12 out/small-matrix

Run again, it measures only what it has not measured yet.
"""

import logging
import sys
from pathlib import Path

import offmap

BACKENDS = ("reserved", "unplugged", "secretmem-bridge")


def main() -> int:
    """Print a line for each kind, and the winner."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # progress, on standard error
    kernel, out = sys.argv[1], Path(sys.argv[2])
    cost: dict[str, float] = {}
    for cell in offmap.run_matrix(out, backends=BACKENDS, host_kernels=[kernel]):
        hidden = cell.answer("hidden.after_io").value
        populate = cell.answer("costs.populate")
        print(f"{cell.spec.backend:<18} hidden: {hidden}  a page costs: {populate.value} µs  {cell.reason}")
        if hidden is True and populate.value is not None:
            cost[cell.spec.backend] = populate.value
    if not cost:
        print("nothing hides there")
        return 1
    print(f"winner: {min(cost, key=lambda backend: cost[backend])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
