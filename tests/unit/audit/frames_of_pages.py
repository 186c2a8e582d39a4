"""Frames from one frame and one state for each page: what tests have, and the audit never."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from offmap.audit.frames import Frames, _Building, runs_of_pages

__all__ = ["frames_of_pages"]


def frames_of_pages(
    pfn: NDArray[np.integer],
    state: NDArray[np.integer],
    reasons: Mapping[str, Sequence[int]] | None = None,
) -> Frames:
    """``reasons`` name pages that are UNKNOWN."""
    building = _Building()
    why = np.zeros(len(state), dtype=np.uint8)
    for reason, pages in (reasons or {}).items():
        why[list(pages)] = building.number(reason)
    building.add(runs_of_pages(pfn.astype(np.int64), state.astype(np.uint8), why))
    return building.frames()
