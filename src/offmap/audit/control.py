"""The positive control: before anything is called absent, the audit must see what is certainly there.

A page of our own memory is in the direct map. Its frame comes from the same pagemap as the guest's, its mapping must be
among those of the same walk, and its content must come out of the same /proc/kcore.
"""

import secrets

import numpy as np

from offmap.audit.kcore import Kcore
from offmap.audit.mappings import KernelMappings, covered
from offmap.audit.own_memory import OwnPage
from offmap.errors import Undetermined
from offmap.uapi.page import PAGE_SIZE

_ATTEMPTS = 3  # our page may be migrated just then


def check_control(page: OwnPage, kcore: Kcore, mappings: KernelMappings) -> None:
    """Find our own page in the walk and read it through kcore.

    Args:
        page: written to before the walk began.

    Raises:
        Undetermined: the walk does not have it, or kcore reads something else there.
    """
    for _ in range(_ATTEMPTS):
        secret = secrets.token_bytes(64)
        page.write(secret)
        frame = page.pfn()
        seen = bytearray(len(secret))
        if not covered(mappings.direct, np.array([frame], dtype=np.uint64))[0]:
            failure = "the walk does not find the auditor's own page in the direct map"
            continue
        kcore.read_virtual(mappings.direct_map_base + frame * PAGE_SIZE, memoryview(seen))
        if seen == secret and page.pfn() == frame:
            return
        failure = "/proc/kcore does not show the auditor's own page"
    raise Undetermined(f"the positive control failed: {failure}", "run the audit again; if it persists, report it")
