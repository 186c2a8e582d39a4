"""Modules by name: order of loading, built-in ones, compressed files."""

import gzip
import lzma
import random
from pathlib import Path

import pytest

from offmap.lab.errors import LabError
from offmap.lab.modules import ModuleIndex, load_module

# As depmod writes it for Debian's 6.12.
DEPENDENCIES = """\
kernel/fs/9p/9p.ko.xz: kernel/net/9p/9pnet.ko.xz kernel/fs/netfs/netfs.ko.xz
kernel/net/9p/9pnet.ko.xz: kernel/fs/netfs/netfs.ko.xz
kernel/fs/netfs/netfs.ko.xz:
kernel/fs/overlayfs/overlay.ko.xz:
kernel/arch/x86/kvm/kvm-amd.ko.xz: kernel/drivers/crypto/ccp/ccp.ko.xz kernel/arch/x86/kvm/kvm.ko.xz kernel/virt/lib/irqbypass.ko.xz
kernel/drivers/crypto/ccp/ccp.ko.xz:
kernel/arch/x86/kvm/kvm.ko.xz: kernel/virt/lib/irqbypass.ko.xz
kernel/virt/lib/irqbypass.ko.xz:
"""  # noqa: E501
INDEX = ModuleIndex(DEPENDENCIES, "kernel/drivers/char/virtio_console.ko\n")


def names(order: list[str]) -> list[str]:
    return [path.rsplit("/", 1)[-1].split(".", 1)[0] for path in order]


def test_dependencies_come_first_and_once() -> None:
    assert names(INDEX.load_order(["9p", "kvm_amd", "overlay"])) == [
        "netfs",
        "9pnet",
        "9p",
        "irqbypass",
        "kvm",
        "ccp",
        "kvm-amd",
        "overlay",
    ]


def test_dash_and_underscore_are_the_same() -> None:
    assert INDEX.load_order(["kvm-amd"]) == INDEX.load_order(["kvm_amd"])
    assert "kvm-amd" in INDEX


def test_built_in_needs_no_file() -> None:
    assert INDEX.load_order(["virtio_console"]) == []
    assert "virtio_console" in INDEX


def test_missing_module_is_named() -> None:
    with pytest.raises(LabError, match="no module vfio"):
        INDEX.load_order(["vfio"])


def test_loop_is_an_error() -> None:
    with pytest.raises(LabError, match="loop"):
        ModuleIndex("a.ko: b.ko\nb.ko: a.ko\n").load_order(["a"])


def test_folder_without_index_is_empty(tmp_path: Path) -> None:
    assert not ModuleIndex.of(tmp_path)


@pytest.mark.parametrize(("suffix", "compress"), [(".ko", bytes), (".ko.xz", lzma.compress), (".ko.gz", gzip.compress)])
def test_uncompressed_content(tmp_path: Path, suffix: str, compress: type) -> None:
    content = random.Random(1).randbytes(1000)
    path = tmp_path / f"m{suffix}"
    path.write_bytes(compress(content))
    assert load_module(path) == content


def test_truncated_module_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.ko.xz"
    path.write_bytes(lzma.compress(bytes(1000))[:40])
    with pytest.raises(LabError, match=r"cannot read the module .*m\.ko\.xz"):
        load_module(path)


def test_zstd_without_the_command_says_what_to_install(tmp_path: Path) -> None:
    path = tmp_path / "m.ko.zst"
    path.write_bytes(b"x")
    with pytest.raises(LabError, match="install zstd"):
        load_module(path, tools={})
