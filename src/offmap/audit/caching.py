"""How a kernel mapping caches its page: as memory, or as the registers of a device."""

import numpy as np
from numpy.typing import NDArray

# pgtable_types.h: _PAGE_PWT, _PAGE_PCD, _PAGE_PAT (in leaves of 4 KiB), _PAGE_PAT_LARGE
_PWT, _PCD = np.uint64(1 << 3), np.uint64(1 << 4)
_PAT, _LARGE_PAT = np.uint64(1 << 7), np.uint64(1 << 12)


def is_cached(entry: NDArray[np.uint64], depth: int) -> NDArray[np.bool_]:
    """Whether each leaf of this level maps its page as memory is mapped: write-back, write-through, write-protected.

    The entries of the PAT are those that Linux writes (``arch/x86/mm/pat/memtype.c``, ``pat_bp_init``): WB, WC, UC-,
    UC, WB, WP, UC-, WT.
    """
    through = entry & _PWT != 0
    cached = ~through & (entry & _PCD == 0)
    if through.any():
        cached |= through & (entry & (_PAT if depth == 1 else _LARGE_PAT) != 0)
    return np.asarray(cached, dtype=np.bool_)
