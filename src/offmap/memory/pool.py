"""A file of a pool: memory that an administrator has taken off the kernel before (kernel/module/poolfs.c).

A user who may create files in the pool's folder needs no other right. It is zeroed already.
"""

import os

from offmap.hidden_files import DEFAULT_POOL, pool_file
from offmap.kvm import Vm
from offmap.memory.backend import Backend
from offmap.memory.backing import Backing
from offmap.options import Options
from offmap.typed import Self


class Pool(Backend):
    """``pool[,path=FOLDER]``: of the pool that is mounted there."""

    name = "pool"
    usage = f"path=FOLDER, in a pool ({DEFAULT_POOL} without it)"
    hides = True
    may_be_aliased = False
    needs_module = True
    linux_owned = False
    compared = False

    def __init__(self, path: str = DEFAULT_POOL) -> None:
        self.path = path

    @classmethod
    def from_options(cls, options: Options) -> Self:
        return cls(options.text("path", DEFAULT_POOL, str))

    def allocate(self, vm: Vm, size: int) -> list[Backing]:
        fd = pool_file(self.path, size)
        try:
            # The mapping holds the file, and with the mapping's end the memory goes back to the pool.
            return [Backing(f"a file in {self.path}", fd, size)]
        finally:
            os.close(fd)

    def placed_from(self) -> list[str]:
        return ["pool", os.path.abspath(self.path)]  # noqa: PTH100 - it may be a link
