"""Whether this host's KVM can give a guest kvm-clock on memory that the kernel has no mapping of."""

import os

from offmap.errors import OffmapError
from offmap.kvm.system import Kvm
from offmap.uapi.kvm import KVM_CAP_X86_KVMCLOCK_HVA

# Kernels as released write the guest's pvclock by a kernel address, and oops where there is none. One with offmap's
# patch (kernel/patches/) goes by userspace address, and says so. It is not tried out: that is what would oops. The
# number of the capability is not upstream's yet, so that another kernel's may mean anything.
_OURS = "-offmap-"


def is_safe_on_hidden_memory(release: str | None = None) -> bool:
    """Whether KVM says that it updates pvclocks by userspace address; anything else is a no.

    Args:
        release: of the host's kernel, as ``uname -r`` says it; None: asks for it.
    """
    if release is None:
        release = os.uname().release
    if _OURS not in release:
        return False
    import re

    if not re.search(_OURS + r"[0-9a-f]+\b", release):
        return False
    try:
        with Kvm() as kvm:
            return kvm.check_extension(KVM_CAP_X86_KVMCLOCK_HVA) == 1
    except OffmapError:
        return False
