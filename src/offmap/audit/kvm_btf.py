"""The types of the running kernel, of kvm.ko, and of its part for this processor, which each go on where the kernel's
end. Where KVM is built in, the kernel's own have them."""

from functools import lru_cache
from pathlib import Path

from offmap.audit.btf import Btf, Unknown, host_types
from offmap.audit.procfs import read_sysfs

_BTF = Path("/sys/kernel/btf")
_CPUINFO = Path("/proc/cpuinfo")


@lru_cache(maxsize=1)
def kvm_types() -> Btf:
    """The kernel's types with those of kvm.ko. Raises Unknown: this kernel does not describe its structures."""
    return _with_module("kvm")


@lru_cache(maxsize=1)
def vendor_types() -> tuple[Btf, str]:
    """The kernel's types with those of kvm_amd or kvm_intel, whichever this processor takes, and the name of the
    ``struct`` that begins with its ``struct kvm_vcpu``.

    Raises:
        Unknown: they are not described.
    """
    try:
        flags = next(line for line in _CPUINFO.read_text(encoding="utf-8").splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        raise Unknown(f"{_CPUINFO} does not tell what kind of processor this is") from None
    module, name = ("kvm_amd", "vcpu_svm") if "svm" in flags.split() else ("kvm_intel", "vcpu_vmx")
    types = _with_module(module)
    types.size(name)
    return types, name


def _with_module(name: str) -> Btf:
    try:
        types, path = host_types(), _BTF / name
        return types.with_module(read_sysfs(str(path))) if path.exists() else types
    except OSError as error:
        raise Unknown(f"this kernel does not describe its structures: {error.strerror}") from None
    except Unknown as error:
        raise Unknown(f"this kernel does not describe its structures: {error}") from None
