"""What the top tables of other roots of page tables have beside those of ``init_top_pgt``."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# One entry of a top table that is not init_top_pgt's: its place in the table, and what it says.
TOP_ENTRY = np.dtype([("index", np.uint16), ("entry", np.uint64)])


@dataclass(frozen=True)
class Tops:
    """What the top tables of other roots than init_top_pgt have.

    Attributes:
        entries: array of TOP_ENTRY, each once.
        roots: how many roots of each kind were looked at.
        problems: why there may be more.
    """

    entries: NDArray[np.void]
    roots: dict[str, int]
    problems: tuple[str, ...] = ()

    @classmethod
    def none(cls) -> "Tops":
        return cls(np.empty(0, dtype=TOP_ENTRY), {})
