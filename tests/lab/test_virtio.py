"""Guests with drives and entropy on RAM of every kind: contents compared end to end, and hidden while I/O goes on."""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from offmap.audit.canary import CanaryKey, new_key
from offmap.compare.guest import PLANTED, READY, canary_parameters, guest_initramfs
from offmap.kmod.lab_build import lab_module
from offmap.lab.cpio import directory, regular
from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel
from offmap.lab.modules import ModuleIndex, load_module

from .conftest import soak
from .console import CMDLINE, Guest
from .test_module import insert

pytestmark = pytest.mark.lab

MIB = 1 << 20
MODULES = ("virtio_mmio", "virtio_blk", "virtio_rng")


@pytest.fixture(scope="module")
def initrd(lab_host: LabHost, lab_kernel: HostKernel) -> Path:
    """Give the small guest with the modules of its devices, where the shared host can see it."""
    assert lab_host.options.out is not None
    names = ModuleIndex.of(lab_kernel.modules).load_order(MODULES)
    extra = [directory("modules")]
    extra += [regular(f"modules/{n:02}.ko", load_module(lab_kernel.modules / name)) for n, name in enumerate(names)]
    path = lab_host.options.out / "virtio.initramfs"
    path.write_bytes(guest_initramfs(extra))
    return path


@pytest.fixture
def drives(lab_host: LabHost) -> Iterator[str]:
    """Give a folder in the host, of RAM, with `data` (12 MiB) and `readonly` (2 MiB and a bit) in it."""
    folder = "/tmp/drives"
    script = f"""
        mkdir {folder} && mount -t tmpfs none {folder} && cd {folder}
        head -c 12M /dev/urandom >data; head -c 2097400 /dev/urandom >readonly
    """
    assert lab_host.output(["sh", "-c", script]).status == 0
    yield folder
    assert lab_host.output(["sh", "-c", f"umount {folder} && rmdir {folder}"]).status == 0


def md5(host: LabHost, file: str, skip: int = 0, count: int = -1) -> str:
    """Of some MiB of a file in the host."""
    part = f"tail -c +{skip * MIB + 1} {file}" + (f" | head -c {count}" if count >= 0 else "")
    return host.output(["sh", "-c", f"{part} | md5sum"]).stdout.decode().split()[0]


def load(guest: Guest) -> None:
    guest.expect(READY)
    assert guest.shell("for m in /modules/*.ko; do insmod $m || echo no $m; done") == ""


def use_drives(host: LabHost, guest: Guest, folder: str) -> None:
    """Read, write, flush, discard and zero, each seen from both sides."""
    read = "dd bs=1M iflag=direct 2>/dev/null if="
    assert guest.shell(f"{read}/dev/vda | md5sum").split()[0] == md5(host, f"{folder}/data")
    assert guest.shell("cat /sys/block/vda/size /sys/block/vdb/size").split() == ["24576", "4096"]
    assert guest.shell("cat /sys/block/vda/serial; echo; cat /sys/block/vdb/ro").split() == ["number-7", "1"]
    assert guest.shell(f"{read}/dev/vdb | md5sum").split()[0] == md5(host, f"{folder}/readonly", 0, 2 * MIB)
    wrote = guest.shell("dd if=/dev/urandom of=/tmp/x bs=1M count=5 2>/dev/null; md5sum </tmp/x").split()[0]
    guest.shell("dd if=/tmp/x of=/dev/vda bs=20k seek=154 conv=fsync,notrunc 2>/dev/null")
    assert guest.shell(f"{read}/dev/vda | tail -c +{154 * 20480 + 1} | head -c {5 * MIB} | md5sum").split()[0] == wrote
    tail = f"tail -c +{154 * 20480 + 1} {folder}/data | head -c {5 * MIB} | md5sum"
    assert host.output(["sh", "-c", tail]).stdout.decode().split()[0] == wrote
    zeroes = hashlib.md5(bytes(MIB)).hexdigest()
    guest.shell(
        "blkdiscard -o 9437184 -l 1048576 /dev/vda; dd if=/dev/zero of=/dev/vda bs=1M seek=10 count=1 conv=fsync"
    )
    assert md5(host, f"{folder}/data", 9, MIB) == md5(host, f"{folder}/data", 10, MIB) == zeroes


def command_line(kernel: HostKernel, initrd: Path, folder: str, *more: str) -> list[str]:
    options = ["--initrd", str(initrd), "--cmdline", CMDLINE, "--memory-size", "256M"]
    options += ["--drive", f"{folder}/data,serial=number-7", "--drive", f"{folder}/readonly,readonly=on", "--rng"]
    return [*options, *more]


def refused(host: LabHost, *options: str) -> str:
    done = host.output([sys.executable, "-m", "offmap", "run", *options])
    text = done.stderr.decode()
    assert (done.status, done.stdout) == (2, b""), text
    assert text.count("\n") == 1, text
    return text


def test_drives_of_a_hidden_guest(
    lab_host: LabHost, lab_kernel: HostKernel, lab_out: Path, initrd: Path, drives: str
) -> None:
    # Files of this machine are on 9p in the host, and so is this one: 9p pins the pages that it reads into, which
    # hidden RAM refuses.
    (lab_out / "pinned").write_bytes(os.urandom(MIB))
    lab_host.output(["sh", "-c", f"mkdir {drives}/small; mount -t tmpfs -o size=2M none {drives}/small"])
    lab_host.output(["sh", "-c", f"truncate -s 8M {drives}/small/full"])
    more = ["--drive", f"{lab_out}/pinned", "--drive", f"{drives}/small/full"]
    options = command_line(lab_kernel, initrd, drives, "--memory", "reserved", "--audit=watch", *more)
    with Guest(lab_host, lab_kernel.vmlinuz, *options) as guest:
        load(guest)
        guest.keys("(while :; do dd if=/dev/vda of=/dev/null bs=64k iflag=direct 2>/dev/null; sleep 0.2; done) &\n")
        use_drives(lab_host, guest, drives)
        guest.expect_error("^HIDDEN: ")

        text = refused(lab_host, "--kernel", str(lab_kernel.vmlinuz), "--drive", f"{drives}/data")
        assert "in use: another guest has it open" in text and "readonly=on" in text

        pinned = hashlib.md5((lab_out / "pinned").read_bytes()).hexdigest()
        assert guest.shell("md5sum </dev/vdc").split()[0] == pinned
        guest.shell("dd if=/tmp/x of=/dev/vdc bs=4k count=3 conv=fsync,notrunc 2>/dev/null")
        assert (lab_out / "pinned").read_bytes()[:12288] != bytes(12288)
        assert "goes through a buffer of offmap's own" in guest.errors

        # A disk that is full: the guest is told so, and only about what did not fit.
        guest.keys("dd if=/tmp/x of=/dev/vdd bs=64k conv=fsync; echo status=$?\n")
        assert guest.expect(r"status=(\d)") == "1"
        assert guest.errors.count("No space left on device; the guest gets an I/O error") == 1

        random = {guest.shell("head -c 32 /dev/hwrng | md5sum") for _ in range(2)}
        assert len(random) == 2
        log = guest.shell("dmesg")
        assert not re.search(r"virtio.*(fail|error|not)|nobody cared|BUG|Oops", log), log
        guest.keys("poweroff -f\n")
        assert guest.end() == 0, guest.errors
    lab_host.output(["umount", f"{drives}/small"])


@pytest.fixture
def unplugged(lab_host: LabHost, lab_out: Path) -> Iterator[None]:
    """Load the module for as long as a test lasts."""
    insert(lab_host, lab_module(lab_host.kernel), lab_out)
    yield
    done = lab_host.output([sys.executable, "-m", "offmap", "module", "unload"])
    assert done.status == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory", "verdict", "more"),
    [
        ("unplugged", "HIDDEN", ("--vcpus", "2")),
        soak("unplugged", "HIDDEN", ("--virtio-mmio-cmdline",)),
        ("anon", "EXPOSED", ("--vcpus", "2")),
    ],
)
@pytest.mark.usefixtures("unplugged")
def test_drives(
    lab_host: LabHost,
    lab_kernel: HostKernel,
    initrd: Path,
    drives: str,
    memory: str,
    verdict: str,
    more: tuple[str, ...],
) -> None:
    options = command_line(lab_kernel, initrd, drives, "--memory", memory, "--audit=watch", *more)
    with Guest(lab_host, lab_kernel.vmlinuz, *options) as guest:
        load(guest)
        guest.keys("(while :; do dd if=/dev/vda of=/dev/null bs=64k iflag=direct 2>/dev/null; sleep 0.2; done) &\n")
        use_drives(lab_host, guest, drives)
        guest.expect_error(f"^{verdict}: ")
        guest.keys("reboot -f\n")
        guest.end()


def load_into(host: LabHost, out: Path, *names: str) -> None:
    """Load modules of its kernel into the host."""
    index = ModuleIndex.of(host.kernel.modules)
    for number, name in enumerate(index.load_order(name for name in names if name in index)):
        there = out / f"{number:02}-{Path(name).name.partition('.')[0]}.ko"
        there.write_bytes(load_module(host.kernel.modules / name))
        done = host.output(["sh", "-c", f"insmod {there} 2>&1 | grep -v 'File exists'; true"])
        assert done.stdout == b"", done.stdout


@pytest.fixture
def on_disk(lab_host: LabHost, lab_out: Path, drives: str) -> Iterator[str]:
    """Give a folder on a file system that has direct I/O: ext4 on a loop device, with what is in `drives`."""
    load_into(lab_host, lab_out, "loop", "ext4", "crc32c_generic")
    script = f"""
        cd {drives} && truncate -s 64M disk && mke2fs -q -F -t ext4 disk && mkdir mnt && mount -o loop disk mnt &&
        cp data readonly mnt/
    """
    done = lab_host.output(["sh", "-c", script])
    assert done.status == 0, done.stderr
    yield f"{drives}/mnt"
    assert lab_host.output(["umount", f"{drives}/mnt"]).status == 0


@pytest.mark.slow
def test_direct_io(lab_host: LabHost, lab_kernel: HostKernel, initrd: Path, on_disk: str) -> None:
    """Refused on hidden RAM; there by the bounce buffer."""
    kernel = str(lab_kernel.vmlinuz)
    text = refused(lab_host, "--kernel", kernel, "--memory", "reserved", "--drive", f"{on_disk}/data,direct=on")
    assert "hidden RAM cannot be; add bounce=on" in text
    for memory, extra in (("reserved", "direct=on,bounce=on"), ("anon", "direct=on")):
        options = ["--initrd", str(initrd), "--cmdline", CMDLINE, "--memory", memory]
        options += ["--drive", f"{on_disk}/data,serial=number-7,{extra}", "--drive", f"{on_disk}/readonly,readonly=on"]
        with Guest(lab_host, lab_kernel.vmlinuz, *options) as guest:
            load(guest)
            use_drives(lab_host, guest, on_disk)
            guest.keys("poweroff -f\n")
            assert guest.end() == 0, guest.errors


def copies(host: LabHost, guest: Guest, key: CanaryKey) -> tuple[int, set[str]]:
    """How many canaries the host kernel can read, and in what: files of its page cache by name, else its own word."""
    done = host.output([sys.executable, "-m", "offmap", "audit", str(guest.pid), "--canary", str(key), "--json"])
    assert done.status in {0, 1}, done.stderr.decode()
    result = json.loads(done.stdout)
    # A canary that is found anywhere makes the verdict "exposed", though none of the guest's pages is mapped.
    assert result["pages"]["direct_map_pages"] == result["pages"]["alias_pages"] == 0
    assert not any(place["in_guest"] for found in result["scan"]["found"] for place in found["places"])
    owners = [place["owner"] for found in result["scan"]["found"] for place in found["places"]]
    names = {
        owner["name"].partition(" (")[0].rpartition("/")[2] if owner["sort"] == "page_cache" else owner["sort"]
        for owner in owners
    }
    return result["scan"]["canaries_found"], names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "where"),
    [
        # `disk` is the medium itself, which is in RAM here.
        ("serial=cached", {"data", "disk"}),
        ("direct=on,bounce=on", {"disk"}),
    ],
)
def test_what_the_host_still_holds_of_what_a_guest_writes(
    lab_host: LabHost, lab_kernel: HostKernel, initrd: Path, on_disk: str, how: str, where: set[str]
) -> None:
    """Hidden RAM keeps the host from reading what is in RAM; what the guest hands out is another matter."""
    key = new_key()
    count = 16
    options = ["--initrd", str(initrd), "--cmdline", f"{CMDLINE} {canary_parameters(key, count)}"]
    options += ["--memory", "reserved", "--drive", f"{on_disk}/data,{how}"]
    with Guest(lab_host, lab_kernel.vmlinuz, *options) as guest:
        guest.expect(PLANTED.format(count))
        load(guest)
        assert copies(lab_host, guest, key) == (0, set())
        # Each padded to a page of its own.
        guest.shell("for f in /canaries/*; do dd if=$f bs=4k conv=sync 2>/dev/null; done >/tmp/padded")
        guest.shell("dd if=/tmp/padded of=/dev/vda bs=4k conv=fsync,notrunc 2>/dev/null")
        lab_host.output(["sync"])
        assert copies(lab_host, guest, key) == (count, where)
        guest.keys("poweroff -f\n")
        assert guest.end() == 0, guest.errors
