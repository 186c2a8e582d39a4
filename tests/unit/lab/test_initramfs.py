"""What goes into the initramfs, and what is said when something is missing."""

from pathlib import Path

import pytest

from offmap.lab import initramfs
from offmap.lab.errors import LabError
from offmap.lab.kernel import HostKernel


def test_entries() -> None:
    order = {"needed": ["kernel/fs/9p/9p.ko.xz"], "kvm_amd": ["kernel/arch/x86/kvm/kvm-amd.ko"]}
    modules = {name: name.encode() for names in order.values() for name in names}
    entries = {entry.path: entry for entry in initramfs.compose(b"init", b"shell", order, modules, {"OUT": "/a 'b"})}
    assert entries["init"].mode == 0o100755
    assert entries["dev/console"].rdev == (5, 1)
    assert entries["modules/needed"].data == b"9p.ko\n"
    assert entries["modules/kvm_amd"].data == b"kvm-amd.ko\n"
    assert entries["modules/9p.ko"].data == b"kernel/fs/9p/9p.ko.xz"
    assert entries["lab.conf"].data == b"OUT='/a '\"'\"'b'\n"


def test_kernel_without_9p_is_refused(tmp_path: Path) -> None:
    (tmp_path / "modules.dep").write_text("kernel/fs/overlayfs/overlay.ko:\n")
    kernel = HostKernel("test", "6.12", tmp_path / "k", tmp_path)
    with pytest.raises(LabError, match="no module virtio_pci; use a kernel with 9p"):
        initramfs.initramfs(kernel, {})


def test_dynamic_busybox_is_no_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "busybox"
    fake.write_bytes(b"\x7fELF" + bytes(200) + b"/lib64/ld-linux-x86-64.so.2")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(initramfs, "_BUSYBOX", ())
    with pytest.raises(LabError, match="install busybox-static"):
        initramfs.busybox()
