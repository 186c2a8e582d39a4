"""A pool of the offmap module on real kernels: memory set aside once, and given out as files."""

import json
import re
import shlex
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from offmap.compare.guest import READY, guest_initramfs
from offmap.kmod.lab_build import lab_module
from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel
from offmap.lab.provision import host_kernel
from offmap.patience import scaled

from . import prepared
from .conftest import words_for

pytestmark = pytest.mark.lab

TARGET = "tests.lab.pool_target"
ROOT = Path(__file__).parents[2]
PATIENCE = 120.0  # seconds on an idle machine
OFFMAP = [sys.executable, "-m", "offmap"]
MIB = 1 << 20
SIZE = 256 * MIB
BLOCK = 128 * MIB
TROUBLE = re.compile(r"WARNING:|BUG:|lost until|cannot give|counts as RAM")


def insert(host: LabHost, out: Path) -> None:
    done = host.output(["insmod", str(out / "offmap.ko")])
    assert done.status == 0, done.stderr


def start(kernel: HostKernel, out: Path, devices: tuple[str, ...] = ()) -> LabHost:
    words = f"{words_for(kernel)}{' intel_iommu=on' if devices else ''}"
    # QEMU cannot restore every device.
    fresh = bool(devices)
    host = LabHost.start(kernel, memory="2G", cmdline=words, accel="tcg", out=out, devices=devices, fresh=fresh)
    shutil.copy(lab_module(host.kernel), out / "offmap.ko")
    insert(host, out)
    host.output(["mount", "-t", "debugfs", "debugfs", "/sys/kernel/debug"])
    return host


def ask(host: LabHost, *what: str) -> Any:
    done = prepared.run(host, TARGET, *what)
    assert done.status == 0, done.stderr
    return json.loads(done.stdout)


def check_end(host: LabHost) -> None:
    """Nothing is out, and the kernel had nothing to complain of."""
    assert host.output(["rmmod", "offmap"]).status == 0
    log = host.output(["dmesg"]).stdout.decode()
    assert not TROUBLE.search(log), log


@pytest.fixture(scope="module")
def host(lab_kernel: HostKernel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabHost]:
    with start(lab_kernel, tmp_path_factory.mktemp("out")) as host:
        yield host


def test_no_pool_while_a_guest_of_it_could_be_a_host(host: LabHost) -> None:
    """VMRUN on memory without struct page panics a kernel before 6.13, and kvm_amd is loaded with nested=1 here."""
    assert ask(host, "nested") == {"refused": "ENOTSUP"}


def test_a_pool_from_mount_to_unmount(host: LabHost) -> None:
    found = ask(host, "basics")
    kib = found.pop("missing kib")
    assert abs(kib) <= 8192  # page tables and the like of other blocks than before
    assert found == {
        "no size": "EINVAL",
        "too much": "ENOMEM",
        "2^64 - 1": "ENOMEM",
        "unprivileged mount": "EPERM",
        "size": [SIZE, SIZE],
        "the group": "",
        "others": "EACCES",
        "left": "",
        "found again": "",
        "found by others": "EACCES",
        "more than there is": "ENOSPC",
        "zero": True,
        "mapped": SIZE,
        "aligned": True,
        "claimed": True,
        "none left": "ENOSPC",
        "read": "EINVAL",
        "write": "EINVAL",
        "O_DIRECT": "EINVAL",
        "sendfile": "EINVAL",
        "private": "EINVAL",
        "exec": "EPERM",
        "beyond": "EINVAL",
        "link": "EPERM",
        "symlink": "EPERM",
        "busy": "EBUSY",
        "a folder counts": 1,
        "zero again": True,
        "back": dict.fromkeys(("direct_map", "blocks", "offline", "claimed", "memtypes"), True),
    }


def test_pieces_of_a_file_go_back_and_can_be_had_again(host: LabHost) -> None:
    assert ask(host, "holes") == {
        "part of a page": "EINVAL",
        "blocks": SIZE - 20 * MIB,
        "other is zero": True,
        "touch": "SIGBUS",  # the control: another file has what was given back
        "zero": True,
        "blocks after": SIZE,
        "rest": True,
        "beyond": "SIGBUS",
        "shorter": 64 * MIB,
        "too far": "ENOSPC",
        "nothing kept": 0,
        "longer": [128 * MIB, 128 * MIB],
        "longer is zero": True,
    }


def test_a_pool_grows_and_shrinks(host: LabHost) -> None:
    assert ask(host, "sizes") == {
        "again and again": "",
        "at first": BLOCK,
        "grown": [3 * BLOCK, 3 * BLOCK - 64 * MIB],
        "shrunk": [BLOCK, BLOCK - 64 * MIB],
        "too small": "EBUSY",
        "left": 2 * BLOCK,
        "another option": "EINVAL",
    }


def test_one_user_cannot_have_more_than_the_quota(host: LabHost) -> None:
    assert ask(host, "quotas") == {
        "all": "",
        "one more": "EDQUOT",
        "another user": "",
        "a hole": "",
        "touch it": "SIGBUS",
        "root touches it": "",
        "given": "EDQUOT",
        # 2 MiB of the hole are there again, and what root gives goes beyond the quota.
        "users": [["4711", str(66 * MIB), "3"], ["4712", str(132 * MIB), "2"]],
        "no quota": "",
        "size": SIZE + BLOCK,
        "a byte is a page": ["", "EDQUOT"],
    }


def test_what_the_kernel_holds_back_is_on_its_users_account(host: LabHost) -> None:
    """Else one user could have all of a pool held back, whatever the quota."""
    assert ask(host, "held") == {
        "held": 64 * MIB,
        "users": [["4711", str(64 * MIB), "0"]],
        "more": "EDQUOT",
        "another user": "",
        "afterwards": "",
    }


def test_a_guarded_mapping_stays_as_it_is(host: LabHost) -> None:
    attempts = ("unmap", "unmap a part", "move", "protect", "protect a part", "map over", "map over a part")
    assert ask(host, "guards") == {"control": "", "end": "", **dict.fromkeys(attempts, "EPERM")}


def test_guests_come_and_go_and_see_nothing_of_each_other(host: LabHost) -> None:
    found = ask(host, "stress", "12", "512", "32", "160")
    assert found["said"].keys() <= {"runs", "full"}
    assert found["said"]["runs"] > 6
    assert found["most"] > 1
    assert found["pool"] == [found["size"], found["size"], 0, 0, 0]
    assert all(found["same"].values())


USER = "setpriv --reuid 4711 --regid 4712 --clear-groups --bounding-set=-all --no-new-privs"  # one of the group kvm
RUN = f"{sys.executable} -m offmap run --memory pool --memory-size 256M --kernel /run/monitor.elf"
QEMU = """qemu-system-x86_64 -nodefaults -no-user-config -display none -accel kvm -m 256M -sandbox on
    -object memory-backend-file,id=ram,size=256M,mem-path=/run/hidden,share=on,align=2M
    -M microvm,acpi=on,memory-backend=ram -cpu host -kernel /run/vmlinuz -initrd /run/guest.initramfs -serial stdio
    -append "console=ttyS0 quiet reboot=t" """


@contextmanager
def pool_of_256m(host: LabHost, *kernels: Path) -> Iterator[None]:
    """A pool for the group that has /dev/kvm, and what guests boot from in /run, where all users may read it."""
    assert host.options.out is not None
    copies = [path.as_posix() for path in kernels]
    script = "cp $@ /run; chmod a+r /run/*; chgrp 4712 /dev/kvm; chmod 660 /dev/kvm"
    assert host.output(["sh", "-c", script, "sh", *copies]).status == 0
    create = [*OFFMAP, "pool", "create", "256M", "--group", "4712", "--allow-nested"]
    assert host.output(create, timeout=scaled(PATIENCE)).stdout == b"256 MiB at /run/hidden\n"
    yield
    assert host.output([*OFFMAP, "pool", "destroy"]).status == 0


@contextmanager
def vmm_of_a_user(host: LabHost, command: str, sign: bytes) -> Iterator[tuple[int, str]]:
    """Start a VMM on the pool, as a user who has no other right; its PID, and what it said until `sign`."""
    heard, ready = bytearray(), threading.Event()

    def listen(data: bytes) -> None:
        heard.extend(data)
        if re.search(sign, heard, re.MULTILINE):
            ready.set()

    shell = ["sh", "-c", f'echo pid $$ >&2; exec {USER} "$@"', "sh", *shlex.split(command)]
    vmm = host.popen(shell, stdout=listen, stderr=listen, keep_stdin=True, cwd=ROOT)
    try:
        assert ready.wait(scaled(PATIENCE)), heard
        found = re.search(rb"pid (\d+)", heard)
        assert found
        yield int(found[1]), heard.decode(errors="replace")
    finally:
        vmm.kill()
        vmm.wait(scaled(PATIENCE))


WRAPPED = f"{sys.executable} -m offmap wrap --memory pool -- {sys.executable} -m tests.lab.wrap_vmm own /run/hidden"


def audit(host: LabHost, pid: int, *options: str) -> Any:
    return json.loads(prepared.run(host, "offmap", "audit", str(pid), "--json", *options).stdout)


def test_a_guest_of_a_user_without_any_right_is_hidden(host: LabHost, payload: Callable[[str], Path]) -> None:
    assert host.options.out is not None
    monitor = host.options.out / "monitor.elf"
    monitor.write_bytes(payload("monitor").read_bytes())
    with pool_of_256m(host, monitor):
        with vmm_of_a_user(host, RUN, b"U$") as (pid, said):
            assert f"offmap run: the guest's RAM is placed, not audited: that takes root (offmap audit {pid})" in said
            result = audit(host, pid)
            assert (result["verdict"], result["pages"]["pages_populated"]) == ("hidden", SIZE // 4096)
        # A wrapped VMM that brings files of the pool: one is guarded, one cannot be opened again without a right.
        with vmm_of_a_user(host, WRAPPED, b"placed, not audited.*again: offmap audit") as (pid, said):
            found = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
            assert found == {"pid": pid, "open": ["", "EPERM", True, True, "", ""], "closed": ["EPERM", ""]}
            assert "no open file of /run/hidden/" in said
            assert audit(host, pid)["verdict"] == "hidden"


@pytest.mark.slow
def test_an_unmodified_qemu_without_any_right_is_hidden(host: LabHost) -> None:
    assert host.options.out is not None
    kernel, initrd = host.options.out / "vmlinuz", host.options.out / "guest.initramfs"
    shutil.copy(host.kernel.vmlinuz, kernel)
    initrd.write_bytes(guest_initramfs())
    with pool_of_256m(host, kernel, initrd), vmm_of_a_user(host, QEMU, READY.encode()) as (pid, _):
        (line,) = host.output(["grep", "/run/hidden", f"/proc/{pid}/maps"]).stdout.decode().splitlines()
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        assert (end - start, start % (2 * MIB)) == (SIZE, 0)
        result = audit(host, pid, "--range", f"{start:#x}:{SIZE:#x}")
        pages = result["pages"]
        assert (pages["pages_populated"], pages["unknown_pages"], pages["direct_map_pages"]) == (SIZE // 4096, 0, 0)
        # kvm-clock is on: KVM maps the page that the guest registered for it.
        assert {alias["region"] for alias in result["aliases"]} <= {"vmalloc/ioremap space"}


def test_a_page_that_fails_is_never_given_out_again(host: LabHost) -> None:
    """The last that can be done with a host: the module cannot be unloaded after that."""
    check_end(host)
    assert host.options.out is not None
    insert(host, host.options.out)
    check_failure(host, "mce")
    assert ask(host, "failed_early") == {"still taking": True, "mounted": True, "failed": 4096}


def check_failure(host: LabHost, how: str) -> None:
    found = ask(host, "failed", how)
    if how != "mce":
        assert found["told"] == "SIGBUS at 0x7000 1"
    assert (found["signal"], found["other page"]) == ("SIGBUS", "")
    assert (found["failed"], found["all of it"], found["zero"], found["given again"]) == (4096, "ENOSPC", True, False)
    assert (found["returning"], found["kept"]) == (0, BLOCK)
    log = host.output(["dmesg"]).stdout.decode()
    assert not TROUBLE.search(log), log


@pytest.mark.slow
def test_memory_that_a_device_may_still_reach_is_given_to_nobody(lab_kernel: HostKernel, tmp_path: Path) -> None:
    """A VMM ends and leaves its device's mappings; then the device writes to memory that is another's."""
    devices = ("-device", "intel-iommu", "-device", "edu,addr=0x10")
    with start(lab_kernel, tmp_path, devices) as host:
        assert host.output(["modprobe", "vfio-pci"]).status == 0
        done = host.output([sys.executable, "-m", "tests.lab.vfio_target"], timeout=scaled(PATIENCE), cwd=ROOT)
        assert done.status == 0, done.stderr.decode()
        assert json.loads(done.stdout) == {
            "default": {
                "reached": True,
                "held": 4 * MIB,
                "given out again": "ENOSPC",
                "returning": BLOCK,
                "at the end": 0,
            },
            "allow_vfio": {
                "reached": True,
                "held": 0,
                "given out again": "",
                "written to another's": True,  # the control
                "at the end": 0,
            },
        }
        check_end(host)


@pytest.mark.slow
@pytest.mark.parametrize("series", ["6.1", "7.3"])
def test_other_kernels(series: str, tmp_path: Path) -> None:
    with start(host_kernel(f"debian:{series}"), tmp_path) as host:
        if series == "6.1":
            test_no_pool_while_a_guest_of_it_could_be_a_host(host)
        test_a_pool_from_mount_to_unmount(host)
        test_pieces_of_a_file_go_back_and_can_be_had_again(host)
        test_a_pool_grows_and_shrinks(host)
        test_one_user_cannot_have_more_than_the_quota(host)
        if series == "7.3":
            test_a_guarded_mapping_stays_as_it_is(host)
        else:
            # Without mseal(), who unmaps all of it is killed.
            found = ask(host, "guards")
            assert {name: error for name, error in found.items() if not error} == {"control": "", "end": ""}
            assert (found["unmap"], found["map over"], found["map over a part"]) == ("SIGKILL", "SIGKILL", "ENOMEM")
        check_end(host)
        if series == "7.3":
            # Its memory_failure() finds such memory by itself, and names the address.
            insert(host, tmp_path)
            check_failure(host, "hard_offline")
