"""What ``--memory`` asks for, checked before the VMM is started."""

import os

from offmap.errors import OffmapError
from offmap.hidden_files import device_file, pool_file
from offmap.memory.backend import parse_backend
from offmap.memory.pool import Pool
from offmap.memory.unplugged import Unplugged
from offmap.uapi.page import PAGE_SIZE


def words_of(memory: str) -> list[str]:
    """The words for ``source.source_from`` that stand for `memory`, as ``--memory`` names it.

    Raises:
        OffmapError: it cannot be placed under a VMM, or this host does not have it.
    """
    backend = parse_backend(memory)
    if isinstance(backend, Pool):
        path = os.path.abspath(backend.path)  # noqa: PTH100 - it may be a link
        os.close(pool_file(path, PAGE_SIZE))  # refused now, and not when the guest begins
        return ["pool", path]
    if isinstance(backend, Unplugged):
        os.close(device_file())  # the same
        return ["unplugged", str(backend.node)]
    raise OffmapError(
        f"{backend.name} cannot be placed under a VMM", "use --memory pool or --memory unplugged, which are files"
    )
