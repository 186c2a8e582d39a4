"""The attack on real guests: through plain RAM to the secret, to an end on hidden RAM, and through an alias there."""

import hashlib
import json
import secrets
import sys
from pathlib import Path
from typing import Any

import pytest

from offmap.attack.knowledge import learn
from offmap.boot.packed import unpacked
from offmap.compare.guest import guest_initramfs
from offmap.kmod.lab_build import lab_module
from offmap.lab.cpio import Entry, directory, regular
from offmap.lab.firecracker import released_firecracker
from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel
from offmap.lab.modules import ModuleIndex, load_module
from offmap.lab.provision import host_kernel
from offmap.patience import scaled

from .alias_module import alias_module, peek_module
from .conftest import RESERVED

pytestmark = pytest.mark.lab

ROOT = Path(__file__).parents[2]
PAGES = (256 << 20) // 4096
MOST_READS = 200_000
READ_DRIVES = b"""#!/bin/busybox sh
/bin/busybox mount -t devtmpfs devtmpfs /dev
for module in /modules/*.ko; do /bin/busybox insmod $module; done
for drive in /dev/vda /dev/vdb; do
    /bin/busybox sha256sum $drive
done
exec /init
"""


def learnt_of(kernel: HostKernel, out: Path) -> str:
    """A file with what is to be known of a kernel."""
    path = out / f"learnt-{kernel.release}.json"
    path.write_text(json.dumps(learn(kernel.vmlinuz, sorted(kernel.modules.rglob("kvm.ko*"))).to_json()))
    return str(path)


def attacked(kernel: HostKernel, out: Path, *kinds: str, drives: bool = False) -> Any:
    """The results, by kind."""
    extra = with_drives(kernel) if drives else []
    (out / "guest.initramfs").write_bytes(guest_initramfs(extra))
    boot: dict[str, Any] = {"kernel": str(kernel.vmlinuz), "initrd": str(out / "guest.initramfs")}
    if any("firecracker" in kind for kind in kinds):
        (out / "vmlinux").write_bytes(unpacked(kernel.vmlinuz))
        boot |= {"vmlinux": str(out / "vmlinux"), "firecracker": str(released_firecracker())}
    disks, planted = make_disks(out) if drives else ([], {})
    if drives:
        boot["drives"] = ["/dev/vda", "/dev/vdb,direct=on,bounce=on"]
    (out / "job.json").write_text(json.dumps({"boot": boot, "learnt": learnt_of(kernel, out), "drives": planted}))
    with LabHost.start(kernel, memory="2G", cmdline=RESERVED, out=out, devices=tuple(disks), fresh=drives) as host:
        for module in (lab_module(kernel), alias_module(kernel), peek_module(kernel)):
            assert host.run(["insmod", str(module)]) == 0
        if drives:
            load_disk_driver(host, out)
        argv = [sys.executable, "-m", "tests.lab.attack_target", str(out / "job.json"), *kinds]
        done = host.output(argv, timeout=scaled(240), cwd=ROOT)
        assert done.status == 0, done.stderr.decode()
        log = host.output(["dmesg"]).stdout.decode()
        assert not [line for line in log.splitlines() if "WARNING" in line or "BUG" in line]
    return json.loads(done.stdout)


def with_drives(kernel: HostKernel) -> list[Entry]:
    """What the guest needs to read its drives."""
    names = ModuleIndex.of(kernel.modules).load_order(("virtio_mmio", "virtio_blk"))
    modules = [regular(f"modules/{n:02}.ko", load_module(kernel.modules / name)) for n, name in enumerate(names)]
    return [directory("modules"), *modules, regular("read-drives", READ_DRIVES, 0o755)]


def make_disks(out: Path) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Two disks of the host's, which are not in its RAM.

    Returns:
        Arguments for QEMU; of each disk its digest, and that of the secret on it, and the secret in pieces.
    """
    arguments, planted = [], {}
    for slot, name in ((0x1D, "cached"), (0x1E, "direct")):  # behind the devices that the lab counts on
        secret = secrets.token_hex(16).encode()
        pieces = ",".join(secret[at : at + 8].hex() for at in range(0, 32, 8))
        content = b"OFFMAP-SECRET-".rjust(0x210, b"\0") + secret + bytes(0x1_0000 - 0x230)
        (out / name).write_bytes(content)
        disk, digest = (hashlib.sha256(each).hexdigest() for each in (content, secret))
        planted[name] = {"disk": disk, "digest": digest, "pieces": pieces}
        arguments += ["-drive", f"file={out / name},format=raw,if=none,id={name},readonly=off"]
        arguments += ["-device", f"virtio-blk-pci,drive={name},addr={slot:#x}"]
    return arguments, planted


def load_disk_driver(host: LabHost, out: Path) -> None:
    index = ModuleIndex.of(host.kernel.modules)
    for number, name in enumerate(index.load_order(["virtio_blk"])):
        there = out / f"{number:02}.ko"
        there.write_bytes(load_module(host.kernel.modules / name))
        host.run(["insmod", str(there)])
    assert host.run(["test", "-b", "/dev/vdb"]) == 0


def check_recovered(result: Any, most: int = MOST_READS) -> None:
    attempt = result["attempt"]
    assert (result["outcome"], attempt["outcome"], attempt["stage"]) == ("recovered", "recovered", "guest: secret"), (
        result
    )
    assert 1000 < attempt["reads"] < most
    assert result["times"]


def check_ends(result: Any, pages: int = PAGES) -> None:
    attempt, control = result["attempt"], result["control"]
    assert (result["outcome"], attempt["stage"]) == ("ends", "guest: kernel"), result
    assert attempt["guest_pages"] + attempt["missing_pages"] >= pages
    assert control["outcome"] == "recovered" and control["mapped_pages"] == control["guest_pages"] > 1000
    assert 1000 < control["reads"] < MOST_READS
    sizes = {each["name"]: each["bytes"] for each in attempt["residues"]}
    assert sizes["kvm_run"] == 8192 and sizes["registers of the vCPUs, in struct kvm_vcpu"] > 100
    assert sizes["vector registers of the vCPUs"] >= 512  # what FXSAVE saves
    assert 1 << 20 < sizes["memory of the VMM's own"] < 1 << 30


def check_sweep(result: Any) -> None:
    """No 16 bytes of the secret stand in anything that the kernel maps, and all of that was read."""
    sweep = result["attempt"]["sweep"]
    assert (sweep["secret_bytes"], sweep["runs"], sweep["pages_unread"]) == (32, [], 0), result
    assert sweep["bytes_read"] > 1400 << 20


def test_hidden_ram_beside_plain_ram_and_with_an_alias(lab_kernel: HostKernel, tmp_path: Path) -> None:
    found = attacked(lab_kernel, tmp_path, "reserved+=", drives=True)
    for name in ("reserved", "reserved, by command", "reserved, kcore"):
        check_ends(found[name])
        assert found[name]["attempt"]["mapped_pages"] == 0  # the registers of its two drives are hidden too
    assert found["reserved, by command"]["status"] == 0
    check_sweep(found["reserved"])
    # A leak in the VMM's process needs no mapping of the kernel's.
    check_recovered(found["reserved, user memory"])
    assert found["reserved, user memory"]["attempt"]["user_pages"] > 100
    # What the guest reads from a drive is in the host's page cache; with direct=on,bounce=on it is nowhere.
    cached, direct = found["reserved, cached drive"], found["reserved, direct drive"]
    assert (cached["outcome"], cached["attempt"]["stage"]) == ("recovered", "host: page cache of the VMM's files")
    check_ends(direct)
    check_sweep(direct)
    # What no mapping led to is recovered once there is one.
    check_recovered(found["reserved, aliased"], most=1_000_000)
    assert found["reserved, aliased"]["attempt"]["mapped_pages"] >= PAGES
    # kcore gives zeroes for memory that was remapped.
    assert found["reserved, aliased, kcore"]["outcome"] == "reached"
    assert found["reserved, wrong"]["outcome"] == "unknown"


@pytest.mark.slow
@pytest.mark.soak
def test_the_other_kinds_of_ram(lab_kernel: HostKernel, tmp_path: Path) -> None:
    guest = host_kernel("debian:6.1")
    found = attacked(
        lab_kernel,
        tmp_path,
        f"qemu-memfd@{guest.vmlinuz},{learnt_of(guest, tmp_path)}",
        "unplugged",
        "secretmem-bridge=",
        "wrapped-firecracker-pool=",
    )
    check_recovered(found["qemu-memfd, another kernel"])
    check_ends(found["unplugged"])
    # Pages that are aliased are in no slot, and so no guest RAM.
    for name in ("secretmem-bridge", "secretmem-bridge, kcore"):
        check_ends(found[name], pages=PAGES - 2000)
        assert found[name]["attempt"]["mapped_pages"] == 0
    check_ends(found["wrapped-firecracker-pool"], pages=PAGES // 2)
    for name in ("secretmem-bridge", "wrapped-firecracker-pool"):
        check_sweep(found[name])
    assert found["unplugged"]["attempt"]["mapped_pages"] == 0


@pytest.mark.slow
def test_the_same_on_another_kernel(tmp_path: Path) -> None:
    found = attacked(host_kernel("debian:7.3"), tmp_path, "guest_memfd", "unplugged=")
    check_recovered(found["guest_memfd"])
    check_ends(found["unplugged"])
    check_sweep(found["unplugged"])
    assert found["unplugged"]["attempt"]["mapped_pages"] == 0
