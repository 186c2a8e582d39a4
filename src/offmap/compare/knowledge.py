"""What the attacker of a cell knows of a kernel: what stands in the files of its package (offmap.attack.knowledge).

A kernel without BTF, such as our patched ones, has that compiled from its headers.
"""

from functools import cache

import msgspec

from offmap.attack.knowledge import has_btf, learn
from offmap.kmod.build import build_types
from offmap.lab.kernel import HostKernel


@cache
def knowledge_of(kernel: HostKernel) -> bytes:
    """As the file that ``offmap attack --learn`` writes. Read here once: an emulated host takes seconds for that.

    Raises:
        OffmapError: its image or its module of KVM cannot be read, or does not say enough.
    """
    modules = sorted((kernel.modules / "kernel").rglob("kvm.ko*"))
    described = has_btf(kernel.vmlinuz) or not (kernel.modules / "build/Makefile").is_file()
    types = None if described else build_types(kernel.release, kernel.modules)
    return msgspec.json.encode(learn(kernel.vmlinuz, modules, types).to_json())
