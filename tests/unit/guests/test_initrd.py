"""The initrd of a guest."""

import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest

from offmap.guests.initrd import BASE, DEVICES, compose, guest_initrd
from offmap.lab.kernel import HostKernel


def kernel(folder: Path, *names: str, builtin: str = "") -> HostKernel:
    """A kernel with these modules, each of which holds its own name."""
    folder.mkdir()
    for name in names:
        (folder / f"{name}.ko").write_text(name)
    lines = [f"{name}.ko:" for name in names if name != "ext4"]
    (folder / "modules.dep").write_text("\n".join([*lines, "ext4.ko: jbd2.ko" if "ext4" in names else ""]))
    (folder / "modules.builtin").write_text(builtin)
    return HostKernel("test", "6.12", folder / "vmlinuz", folder)


def test_only_the_modules_that_the_kernel_has_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offmap.guests.initrd.busybox", lambda: b"shell")
    names = ("virtio_mmio", "virtio_blk", "jbd2", "ext4", "overlay", "virtio-rng", "virtio_net")
    image = guest_initrd(kernel(tmp_path / "modules", *names, builtin="kernel/virtio_console.ko\n"))
    assert b"virtio_mmio.ko\nvirtio_blk.ko\njbd2.ko\next4.ko\noverlay.ko\n" in image, "dependencies first"
    assert b"modules/virtio-0x0004\0" in image
    assert b"virtio-rng.ko\n" in image
    assert b"virtio_console.ko" not in image, "it is built in"


def test_each_device_has_a_list_of_the_name_that_init_looks_for() -> None:
    lists = {"base": ["a/virtio_mmio.ko.xz"], **{f"virtio-{number}": [] for number in DEVICES}}
    entries = {entry.path: entry for entry in compose(b"shell", lists, {"a/virtio_mmio.ko.xz": b"module"})}
    assert entries["modules/base"].data == b"virtio_mmio.ko\n"
    assert entries["modules/virtio_mmio.ko"].data == b"module"
    # As Linux's dev_show writes it: sprintf(buf, "0x%04x\n", dev->id.device).
    assert all(f"0x{int(number, 16):04x}" == number for number in DEVICES)
    assert "modules/virtio-0x0013" in entries
    assert BASE[0] == "virtio_mmio", "nothing is found without it"


@pytest.mark.parametrize("name", ["init.sh", "udhcpc.sh", "customize.sh"])
def test_scripts_parse(name: str) -> None:
    script = files("offmap.guests").joinpath(name).read_text()
    shell = [shutil.which("busybox") or "busybox", "sh"] if name != "customize.sh" else ["sh"]
    if shutil.which(shell[0]) is None:
        pytest.skip("no busybox: the guest's scripts were not parsed (install busybox-static)")
    done = subprocess.run([*shell, "-n"], input=script, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
