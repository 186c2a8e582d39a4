"""What a cell of the comparison is: one kind of guest RAM, on one host kernel, with one guest."""

import hashlib
import re
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

NATIVE = "native"
"""As a host kernel: the one that this machine runs, without a disposable host."""

KVM_CLOCKS = ("auto", "off", "on")


class CellSpec(Struct, frozen=True, order=True):
    """One cell.

    Attributes:
        backend: the kind of guest RAM (offmap.compare.kinds).
        host_kernel: as ``offmap lab exec --host-kernel`` takes it; NATIVE for the running one, without a lab host.
        guest_kernel: the same.
        vcpus: of the guest.
        kvm_clock: on, off, or auto: on wherever the host kernel can keep it on such RAM, off elsewhere.
    """

    backend: str
    host_kernel: str = "debian:6.12"
    guest_kernel: str = "debian:6.12"
    vcpus: Annotated[int, Meta(ge=1)] = 1
    kvm_clock: Annotated[str, Meta(pattern="^(auto|off|on)$")] = "auto"

    @property
    def key(self) -> str:
        """A name for files: stable, and no two cells have the same."""
        host, guest = _file_name(self.host_kernel), _file_name(self.guest_kernel)
        return f"{self.backend}_on-{host}_guest-{guest}_{self.vcpus}vcpu_clock-{self.kvm_clock}"

    @property
    def setting(self) -> tuple[str, str, int, str]:
        """All but the kind of RAM: cells of one setting stand side by side."""
        return self.host_kernel, self.guest_kernel, self.vcpus, self.kvm_clock

    @property
    def title(self) -> str:
        """A name for people."""
        vcpus = "1 vCPU" if self.vcpus == 1 else f"{self.vcpus} vCPUs"
        clock = "" if self.kvm_clock == "auto" else f", kvm-clock {self.kvm_clock}"
        return f"{self.backend} on {self.host_kernel}, guest {self.guest_kernel}, {vcpus}{clock}"


def _file_name(kernel: str) -> str:
    """``debian:6.12`` as debian-6.12; a path as its last part and a digest of all of it."""
    if re.fullmatch(r"(debian|patched):[0-9.]+", kernel):
        return kernel.replace(":", "-")
    if "/" not in kernel:
        kernel_path = kernel
        if re.fullmatch(r"[a-z]+", kernel):
            return kernel
    else:
        kernel_path = str(Path(kernel).absolute())
    digest = hashlib.sha256(kernel_path.encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9.-]', '-', Path(kernel).name)}-{digest}"
