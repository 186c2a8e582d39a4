"""What the attacker reads of a guest whose RAM is hidden: copies that the host's kernel keeps where it maps them."""

from collections.abc import Iterator

from offmap.attack.host import Host
from offmap.attack.linux import Process
from offmap.attack.result import Residue
from offmap.attack.vm import vcpus
from offmap.uapi.page import PAGE_SIZE

_KVM_RUN_PAGES = 2  # struct kvm_run and the page for port I/O (KVM_PIO_PAGE_OFFSET)
_FILE_NAMES = 8  # named in the note


def residues_of(host: Host, vmm: Process, kvm: int) -> Iterator[Residue]:
    """Read each once, and say how much it is."""
    kernel = host.kernel
    registers = run = 0
    values = []
    for vcpu in vcpus(host, kvm):
        size = 8 * kernel.elements("kvm_vcpu", "arch", "regs")
        registers += len(host.read(vcpu + kernel.offset("kvm_vcpu", "arch", "regs"), size))
        values.append(f"CR3 {host.field(vcpu, 'kvm_vcpu', 'arch', 'cr3'):#x}")
        page = host.pointer_in(vcpu, "kvm_vcpu", "run")
        run += len(host.read(page, PAGE_SIZE)) * _KVM_RUN_PAGES
    yield Residue(name="registers of the vCPUs, in struct kvm_vcpu", bytes=registers, note=", ".join(values))
    yield Residue(name="kvm_run", bytes=run, note="what the last exits of each vCPU said, and data of port I/O")
    cached, names = 0, []
    for name, _, pages in host.cached_files(vmm):
        cached += pages * PAGE_SIZE
        names.append(name)
    if cached:
        more = f" and {len(names) - _FILE_NAMES} more" if len(names) > _FILE_NAMES else ""
        note = "pages of files that the VMM has open: " + ", ".join(names[:_FILE_NAMES]) + more
        yield Residue(name="page cache", bytes=cached, note=note)
