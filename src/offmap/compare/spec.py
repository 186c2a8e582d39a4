"""A cell of the comparison: one kind of guest RAM, on one host kernel, with one guest."""

import hashlib
import re
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

NATIVE = "native"
"""The name of the running kernel as a host kernel: there is no disposable host."""

KVM_CLOCKS = ("auto", "off", "on")


class CellSpec(Struct, frozen=True, order=True):
    """One cell.

    Attributes:
        backend: the kind of guest RAM (offmap.compare.kinds).
        host_kernel: as ``offmap lab exec --host-kernel`` takes it; or NATIVE.
        guest_kernel: as ``--guest-kernel`` takes it.
        vcpus: of the guest.
        kvm_clock: on, off, or auto: on if the host kernel can keep kvm-clock on such RAM.
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
        """All but the kind of RAM. The report shows cells of one setting side by side."""
        return self.host_kernel, self.guest_kernel, self.vcpus, self.kvm_clock

    @property
    def title(self) -> str:
        """A name for people."""
        vcpus = "1 vCPU" if self.vcpus == 1 else f"{self.vcpus} vCPUs"
        clock = "" if self.kvm_clock == "auto" else f", kvm-clock {self.kvm_clock}"
        return f"{self.backend} on {self.host_kernel}, guest {self.guest_kernel}, {vcpus}{clock}"


def _file_name(kernel: str) -> str:
    """``debian:6.12`` becomes debian-6.12; a path becomes its last part and a digest of the whole."""
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
