"""Whether this host's KVM can give a guest kvm-clock on memory that the kernel has no mapping of."""

from offmap.files import FileName, read_text

# Kernels as released write the guest's pvclock by a kernel address, and oops where there is none. One with offmap's
# patch (kernel/patches/) goes by userspace address and says so here. It is not tried out: that is what would oops.
PARAMETER = "/sys/module/kvm/parameters/pvclock_by_hva"


def is_safe_on_hidden_memory(parameter: FileName = PARAMETER) -> bool:
    """Whether KVM says that it updates pvclocks by userspace address; anything else is a no."""
    try:
        return read_text(parameter) == "Y\n"
    except (OSError, ValueError):
        return False
