"""What the attacker of a cell knows of a kernel: what stands in the files of its package (offmap.attack.knowledge)."""

from functools import cache

import msgspec

from offmap.attack.knowledge import learn
from offmap.lab.kernel import HostKernel


@cache
def knowledge_of(kernel: HostKernel) -> bytes:
    """As the file that ``offmap attack --learn`` writes. Read here once: an emulated host takes seconds for that.

    Raises:
        OffmapError: its image or its module of KVM cannot be read, or does not say enough.
    """
    modules = sorted((kernel.modules / "kernel").rglob("kvm.ko*"))
    return msgspec.json.encode(learn(kernel.vmlinuz, modules).to_json())
