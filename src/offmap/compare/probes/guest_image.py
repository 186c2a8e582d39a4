"""The initramfs of the comparison's guest: the small guest, the program that answers in it, and its modules."""

from pathlib import Path

from offmap.compare.guest import guest_initramfs
from offmap.compare.probes.guest_program import guest_program
from offmap.lab.cpio import directory, regular
from offmap.lab.modules import ModuleIndex, load_module

WANTED = (
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "vmw_vsock_virtio_transport",
    "virtio_balloon",
    "msr",
)
"""Drivers that a guest kernel may have as modules. If a kernel lacks one, the probe that needs it says so."""


def probe_initramfs(modules: Path) -> bytes:
    """The archive, uncompressed.

    Args:
        modules: the guest kernel's ``lib/modules/RELEASE`` folder; need not exist.

    Raises:
        OffmapError: no compiler, no busybox, or a module that cannot be read.
    """
    index = ModuleIndex.of(modules)
    names = index.load_order(name for name in WANTED if name in index)
    # Numbered, since the guest inserts them in the order of their names.
    extra = [directory("modules"), regular("bin/guest_program", guest_program(), 0o755)]
    for number, name in enumerate(names):
        stem = Path(name).name.partition(".ko")[0].replace("-", "_")
        extra.append(regular(f"modules/{number:02}-{stem}.ko", load_module(modules / name)))
    return guest_initramfs(extra)
