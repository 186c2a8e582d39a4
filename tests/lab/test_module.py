"""The offmap module on real kernels: what it gives, what it refuses, and what it leaves behind."""

import itertools
import json
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from offmap.audit.canary import new_key
from offmap.compare.guest import READY, canary_parameters, guest_initramfs
from offmap.kmod.lab_build import lab_module
from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel
from offmap.lab.provision import host_kernel
from offmap.patience import scaled

from . import prepared
from .alias_module import alias_module
from .conftest import RESERVED, soak, words_for
from .console import CMDLINE, Guest

pytestmark = pytest.mark.lab

ROOT = Path(__file__).parents[2]
TARGET = str(Path(__file__).with_name("module_target.py"))
LIBRARY_TARGET = str(Path(__file__).with_name("library_target.py"))
OFFMAP = (sys.executable, "-m", "offmap")
CANARIES = 64  # of each guest, and of audit_target.py
MIB = 1 << 20
SIZE = 256 * MIB
PATIENCE = 120.0  # seconds on an idle machine


def insert(host: LabHost, module: Path, out: Path) -> None:
    """Load the module in a host that may not see files made after its start, but for those in its output folder."""
    there = out / "offmap.ko"
    shutil.copy(module, there)
    done = host.output(["sh", "-c", f"grep -q ^offmap /proc/modules || insmod {there}"])
    assert done.status == 0, done.stderr
    host.output(["mount", "-t", "debugfs", "debugfs", "/sys/kernel/debug"])


@pytest.fixture(scope="module")
def host(lab_kernel: HostKernel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabHost]:
    """Give a host with the module loaded, which must go again without a complaint.

    A host of its own: the secret memory of other tests leaves pieces of the direct map split, which memory that comes
    back is not.
    """
    out = tmp_path_factory.mktemp("out")
    with LabHost.start(lab_kernel, memory="2G", cmdline=RESERVED, out=out) as host:
        insert(host, lab_module(lab_kernel), out)
        yield host
        done = host.output([*OFFMAP, "module", "unload"])
        assert done.status == 0, done.stderr
        log = host.output(["dmesg"]).stdout.decode()
        assert not re.search(r"WARNING:|BUG:|lost|cannot give|counts as RAM", log), log


def ask(host: LabHost, what: str) -> Any:
    done = prepared.run(host, "tests.lab.module_target", what)
    assert done.status == 0, done.stderr
    return json.loads(done.stdout)


class Holding:
    """A process of the host that has memory out; a context manager that ends it."""

    def __init__(self, host: LabHost) -> None:
        self._host = host
        self._out = bytearray()
        self._heard = threading.Event()
        self._command = host.popen([sys.executable, TARGET, "hold"], stdout=self._take, keep_stdin=True)

    def _take(self, data: bytes) -> None:
        self._out += data
        if b"\n" in self._out:
            self._heard.set()

    def __enter__(self) -> Any:
        assert self._heard.wait(scaled(PATIENCE))
        return json.loads(self._out)

    def __exit__(self, *_: object) -> None:
        self._command.close_stdin()
        self._command.wait(scaled(PATIENCE))


def given_back(host: LabHost, before: Any) -> None:
    """Check that the host has all that it had."""
    after = ask(host, "state")
    assert after["claimed"] == []
    assert after["offline"] == ""
    assert after["blocks"] == before["blocks"]
    assert after["memtypes"] == before["memtypes"]
    # What described the blocks was in them, and is not given back with them but allocated: the total may grow by it.
    assert 0 <= after["total_kib"] - before["total_kib"] <= before["total_kib"] // 64


def test_what_is_out_is_gone_from_the_host_and_comes_back(host: LabHost) -> None:
    before = ask(host, "state")
    with Holding(host) as out:
        assert sum(length for _, length in out["ranges"]) == SIZE
        # What describes the blocks, a 64th of them, lies in them and never counted.
        assert before["total_kib"] - out["total_kib"] >= (SIZE - SIZE // 64) >> 10
        taken = int(before["direct_map"]["DirectMap2M"]) - int(out["direct_map"]["DirectMap2M"])
        assert taken == SIZE >> 10
        assert out["direct_map"]["DirectMap4k"] == before["direct_map"]["DirectMap4k"]  # nothing was split
        claimed = [tuple(int(end, 16) for end in part.split("-")) for part in out["claimed"]]
        assert sum(end + 1 - start for start, end in claimed) == SIZE
        # Mapped write-back, for no other reason than this entry.
        for start, end in claimed:
            assert f"PAT: [mem 0x{start:016x}-0x{end + 1:016x}] write-back" in out["memtypes"]
        assert [holder[:3] for holder in out["holders"]] == [[str(out["pid"]), "unplugged", str(SIZE)]]
    given_back(host, before)
    assert ask(host, "state")["direct_map"] == before["direct_map"]


def test_what_comes_back_is_online_whatever_the_policy_for_new_memory(host: LabHost) -> None:
    policy = "/sys/devices/system/memory/auto_online_blocks"
    before = ask(host, "state")
    was = host.output(["cat", policy]).stdout.decode().strip()
    for there in ("offline", "online_movable"):
        assert host.output(["sh", "-c", f"echo {there} >{policy}"]).status == 0
        try:
            with Holding(host) as out:
                assert sum(length for _, length in out["ranges"]) == SIZE
            given_back(host, before)
        finally:
            host.output(["sh", "-c", f"echo {was} >{policy}"])


def test_leftovers_are_zeroed_before_and_after(host: LabHost) -> None:
    found = ask(host, "leftovers")
    assert found["leftovers"] > 0  # the control: there was something to zero
    assert found["zero_before"]
    assert found["control"] == MIB // 4096  # and what is there is found
    assert (found["pages"], found["guests_after"]) == (SIZE // 4096, 0)


def test_two_takers_get_disjoint_memory(host: LabHost) -> None:
    found = ask(host, "takers")
    ranges = sorted((start, start + length) for part in found["ranges"] for start, length in part)
    assert ranges
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))
    assert sum(end - start for start, end in ranges) == SIZE * len(found["ranges"])
    assert set(found["errors"]) <= {"", "ENOMEM"}
    assert found["holders"] == len(found["ranges"])


def test_more_than_the_host_can_spare_is_refused_with_a_figure(host: LabHost) -> None:
    before = ask(host, "state")
    found = ask(host, "refusal")
    assert found["error"] == "ENOMEM"
    assert 0 < found["spare"] < 1900 * MIB
    assert (found["holders"], found["then"]) == ([], SIZE)
    given_back(host, before)


def test_who_comes_next_gets_what_is_on_its_way_back(host: LabHost) -> None:
    before = ask(host, "state")
    assert ask(host, "succession") == {"errors": [""] * 6, "while it was getting it": 3}
    given_back(host, before)


def test_hostile_use_is_refused(host: LabHost) -> None:
    assert ask(host, "hostile") == {
        "private": "EINVAL",
        "exec": "EPERM",
        "offset": "EINVAL",
        "no size": "EINVAL",
        "2^63": "ENOMEM",
        "2^64 - 1": "ENOMEM",
        "no such node": "EINVAL",
        "negative node": "EINVAL",
        "flags": "EINVAL",
        "bad pointer": "EFAULT",
        "unknown": "ENOTTY",
        "translate nothing": "ENXIO",
        "translate nobody": "ESRCH",
        "nothing taken yet": "[]",
        "twice": "EBUSY",
        "too large": "EINVAL",
        "beyond": "EINVAL",
        "read-only": "EINVAL",
        "mprotect exec": "EACCES",
        "expand": "EFAULT",
        "duplicate": "EFAULT",
        "dontneed": "EINVAL",
        "dofork": "EINVAL",
        "/proc/self/mem": "EIO",
        "process_vm_readv": "EFAULT",
        "fork": "SIGSEGV",
        "moved": "42",
        "unprivileged": "EPERM",
    }


def test_secretmem_files_that_cannot_be_held_are_refused(host: LabHost) -> None:
    assert ask(host, "secrets") == {
        "no fd": "EBADF",
        "the device itself": "EINVAL",
        "memfd": "EINVAL",
        "a pipe": "EINVAL",
        "a path only": "EBADF",
        "empty": "EINVAL",
        "half a page": "EINVAL",
        "a page missing": "ENODATA",
        "bound": str(4 * MIB),
        "grow": "EINVAL",
        "truncate": "EINVAL",
        "twice": "EBUSY",
        "by another": "EBUSY",
        "private": "EINVAL",
        "too large": "EINVAL",
        "beyond": "EINVAL",
        "unload": "EAGAIN",
        "content": "True",  # after drop_caches and compaction, with nothing else holding the file
        "translated": "True",
        "holders": f"[['secretmem', '{4 * MIB}']]",
    }


def test_unload_is_refused_while_memory_is_out(host: LabHost) -> None:
    with Holding(host) as out:
        done = host.output([*OFFMAP, "module", "unload"])
        assert done.status == 2
        assert re.search(rf"in use by python\S* \({out['pid']}\): 256 MiB", done.stderr.decode())
        status = json.loads(host.output([*OFFMAP, "module", "status", "--json"]).stdout)
        (holder,) = status["holders"]
        assert (holder["pid"], holder["source"], holder["bytes"]) == (out["pid"], "unplugged", SIZE)
    assert host.output(["rmmod", "offmap"]).status == 0
    refused = host.output([*OFFMAP, "module", "status"])
    assert (refused.status, refused.stderr.count(b"\n")) == (2, 1)
    assert host.options.out is not None
    insert(host, lab_module(host.kernel), host.options.out)


def test_killed_while_it_gets_its_memory(host: LabHost) -> None:
    before = ask(host, "state")
    found = ask(host, "kills")
    assert all(5 <= count < 20 for count in found["had"].values()), found
    assert found["holders"] == []
    given_back(host, before)


@pytest.mark.parametrize("backend", ["unplugged", "secretmem-bridge"])
def test_guest_is_hidden(host: LabHost, backend: str) -> None:
    assert host.options.out is not None
    check_guest_is_hidden(host, host.kernel, host.options.out, backend)


def check_guest_is_hidden(host: LabHost, kernel: HostKernel, out: Path, backend: str) -> None:
    initrd = out / "module-guest.initramfs"
    initrd.write_bytes(guest_initramfs())
    options = ("--memory", backend, "--initrd", str(initrd), "--cmdline", CMDLINE)
    with Guest(host, kernel.vmlinuz, *options) as guest:
        guest.expect(READY)
        # What reclaims and moves the host's memory leaves the guest's alone.
        guest.shell("dd if=/dev/urandom of=/kept bs=1M count=8 2>/dev/null")
        before = guest.shell("md5sum /kept")
        churn = "echo 3 >/proc/sys/vm/drop_caches; echo 1 >/proc/sys/vm/compact_memory"
        assert host.output(["sh", "-c", churn]).status == 0
        done = prepared.run(host, "offmap", "audit", str(guest.pid), "--json")
        assert done.status == 0, done.stdout
        pages = json.loads(done.stdout)["pages"]
        assert (pages["direct_map_pages"], pages["alias_pages"], pages["unknown_pages"]) == (0, 0, 0)
        assert pages["pages_populated"] + pages["excluded_pages"] >= SIZE // 4096
        assert guest.shell("md5sum /kept") == before
        assert "/kept" in before


def test_a_guest_by_the_library_gets_no_aliased_page_either(lab_kernel: HostKernel, tmp_path: Path) -> None:
    """On a host that has mapped free pages a second time."""
    initrd = tmp_path / "guest.initramfs"
    initrd.write_bytes(guest_initramfs())
    size = 512 * MIB
    with LabHost.start(lab_kernel, memory="1536M", out=tmp_path) as host:
        insert(host, lab_module(lab_kernel), tmp_path)
        shutil.copy(module := alias_module(lab_kernel), tmp_path)
        assert host.run(["insmod", str(tmp_path / module.name)]) == 0
        command = [sys.executable, LIBRARY_TARGET, str(lab_kernel.vmlinuz), str(initrd), str(size)]
        done = host.output(command, timeout=scaled(PATIENCE) * 2)
        assert done.status == 0, done.stderr.decode()
    found = json.loads(done.stdout)
    excluded = found["ram"]["excluded_pages"]
    assert found["ram"]["vetting"] == "vetted"
    assert excluded > 100
    assert (
        found["said"][0]
        == f"{excluded} pages of the guest's RAM are aliased in the host kernel and kept from the guest"
    )
    assert found["paused"] > 3  # and booted all the same
    assert not found["stopped"]
    pages = found["audit"]["pages"]
    assert (found["audit"]["verdict"], pages["mapped_pages"], pages["unknown_pages"]) == ("hidden", 0, 0)
    assert pages["excluded_pages"] == pages["excluded_mapped_pages"] == excluded
    assert pages["pages_populated"] + excluded == size // 4096


ALIASED_LOW = """
import os, select, sys
import offmap.cli.main
from offmap import hide
from offmap.audit.residency import physical_ranges

real, planted = hide.vet, []
def vet(backend, memory):
    if not planted:
        ((physical, _),) = physical_ranges(os.getpid(), memory.regions[0].userspace_addr + 0x7000, 4096)
        planted.append(os.open("/dev/offmap-alias", os.O_WRONLY))
        os.write(planted[0], f"vmap {physical:#x}".encode())
        ours = os.pidfd_open(os.getpid())
        if not os.fork():  # which holds it as long as the guest lives
            os.closerange(0, 3)
            select.select([ours], [], [])
            os._exit(0)
        os.close(ours)
    return real(backend, memory)
hide.vet = vet
sys.exit(offmap.cli.main.main(sys.argv[1:]))
"""


def test_a_guest_with_an_aliased_page_in_its_first_mib_gets_another(host: LabHost) -> None:
    out = host.options.out
    assert out is not None
    (initrd := out / "low-guest.initramfs").write_bytes(guest_initramfs())
    shutil.copy(module := alias_module(host.kernel), out)
    assert host.run(["insmod", str(out / module.name)]) == 0
    heard, ready = bytearray(), threading.Event()

    def listen(data: bytes) -> None:
        heard.extend(data)
        if READY.encode() in heard:
            ready.set()

    options = ["--memory", "secretmem-bridge", "--memory-size", "128M", "--initrd", str(initrd), "--cmdline", CMDLINE]
    run = [sys.executable, "-c", ALIASED_LOW, "run", "--kernel", str(host.kernel.vmlinuz), *options]
    shell = ["sh", "-c", 'echo "pid $$" >&2; exec "$@"', "sh", *run]
    vmm = host.popen(shell, stdout=listen, stderr=listen, keep_stdin=True)
    try:
        assert ready.wait(scaled(PATIENCE)), heard
        assert b"aliased in the host kernel and kept from the guest" in heard
        found = re.search(rb"pid (\d+)", heard)
        assert found
        done = prepared.run(host, "offmap", "audit", found[1].decode(), "--json")
        result = json.loads(done.stdout)
        assert (done.status, result["verdict"]) == (0, "hidden"), result
        assert result["pages"]["excluded_pages"] == result["pages"]["excluded_mapped_pages"] > 0
    finally:
        vmm.kill()
        vmm.wait(scaled(PATIENCE))
        unload = "while ! rmmod offmap_alias 2>/dev/null; do sleep 0.1; done"
        host.output(["sh", "-c", unload], timeout=scaled(PATIENCE))


def test_under_a_gigabyte_leaf_the_whole_gigabyte_goes_or_nothing(lab_kernel: HostKernel, tmp_path: Path) -> None:
    with LabHost.start(lab_kernel, memory="6G", cmdline="no5lvl nokaslr", out=tmp_path) as host:
        insert(host, lab_module(lab_kernel), tmp_path)
        found = ask(host, "gigabytes")
        assert found["zero"]
        leaves = [int(found[when]["direct_map"]["DirectMap1G"]) >> 20 for when in ("before", "out", "after")]
        assert leaves[0] == leaves[2] > leaves[1]  # the control: there were such leaves, and one had to go
        assert found["after"]["direct_map"] == found["before"]["direct_map"]
        assert (found["after"]["claimed"], found["after"]["offline"]) == ([], "")
        assert 4 << 30 <= found["taken"] < (4 << 30) + (128 << 20)
        # A whole gigabyte comes first in the file, at addresses that one page can map.
        start, length = found["ranges"][0]
        assert length >= 1 << 30
        assert start % (1 << 30) == found["address"] % (1 << 30) == 0
        assert host.output(["rmmod", "offmap"]).status == 0
        assert b"BUG" not in host.output(["dmesg"]).stdout


@pytest.mark.slow
def test_memory_comes_from_the_node_that_was_named_and_goes_back_to_it(lab_kernel: HostKernel, tmp_path: Path) -> None:
    initrd = tmp_path / "guest.initramfs"
    initrd.write_bytes(guest_initramfs())
    with LabHost.start(lab_kernel, memory="2G", nodes=2, out=tmp_path) as host:
        insert(host, lab_module(lab_kernel), tmp_path)
        found = ask(host, "nodes")
        before = found["before"]
        assert set(before) == {"0", "1"}
        assert all(before.values())
        assert sum(map(len, before.values())) == found["total"]
        for node, other in (("0", "1"), ("1", "0")):
            taken = set(found[node]["taken"])
            assert len(taken) == SIZE // (128 * MIB)
            assert taken <= set(before[node])
            assert set(found[node]["out"][node]) == set(before[node]) - taken
            assert found[node]["out"][other] == before[other]
            assert found[node]["after"] == before
        # Both nodes together could; this one has not so much.
        assert found["too much"] == "ENOMEM"
        assert found["spare"] < 1 << 30
        options = ("--initrd", str(initrd), "--cmdline", CMDLINE, "--memory")
        run = [*OFFMAP, "run", "--kernel", str(lab_kernel.vmlinuz), *options]
        done = host.output([*run, "unplugged,node=7"], timeout=scaled(PATIENCE))
        assert (done.status, done.stderr.count(b"\n")) == (2, 1), done.stderr
        assert (
            b"refused: this host cannot give unplugged memory: it has no NUMA node 7; see /sys/devices/system/node"
            in done.stderr
        )
        done = host.output([*run, "unplugged,node=1", "--memory-size", "1G"], timeout=scaled(PATIENCE))
        assert (done.status, done.stderr.count(b"\n")) == (2, 1), done.stderr
        assert re.search(rb"could spare [\d.]+ MiB in whole memory blocks on node 1, not 1 GiB", done.stderr)
        with Guest(host, lab_kernel.vmlinuz, *options, "unplugged,node=1") as guest:
            guest.expect(READY)
            blocks = host.output(["sh", "-c", "ls -d /sys/devices/system/node/node1/memory[0-9]*"]).stdout.split()
            assert len(before["1"]) - len(blocks) == SIZE // (128 * MIB)
            guest.keys("poweroff -f\n")
            assert guest.end() == 0, guest.errors
        assert host.output(["rmmod", "offmap"]).status == 0
        assert not re.search(r"WARNING:|BUG:", host.output(["dmesg"]).stdout.decode())


@pytest.mark.slow
@pytest.mark.parametrize("series", ["6.1", "6.12", "7.3"])
def test_a_guest_is_mapped_by_a_gigabyte_where_the_kernel_can(
    lab_kernel: HostKernel, series: str, tmp_path: Path
) -> None:
    kernel = host_kernel(f"debian:{series}")
    initrd = tmp_path / "guest.initramfs"
    initrd.write_bytes(guest_initramfs())
    with LabHost.start(kernel, memory="6G", cmdline="no5lvl nokaslr", out=tmp_path) as host:
        insert(host, lab_module(kernel), tmp_path)
        before = ask(host, "state")
        options = ("--memory", "unplugged", "--memory-size", "2560M", "--initrd", str(initrd), "--cmdline", CMDLINE)
        with Guest(host, lab_kernel.vmlinuz, *options) as guest:
            guest.expect(READY)
            sizes = ("4k", "2m", "1g")
            files = [f"/sys/kernel/debug/kvm/pages_{size}" for size in sizes]
            counts = host.output(["cat", *files]).stdout.split()
            pages = dict(zip(sizes, map(int, counts), strict=True))
            if series == "6.1":
                assert pages["4k"] and not pages["2m"] and not pages["1g"]
            else:
                # The rest of the memory is no whole gigabyte, and mapped by 2 MiB.
                assert pages["1g"] and pages["2m"] and not pages["4k"], pages
            done = prepared.run(host, "offmap", "audit", str(guest.pid))
            assert done.status == 0, done.stdout
            guest.keys("poweroff -f\n")
            assert guest.end() == 0, guest.errors
        given_back(host, before)
        assert ask(host, "state")["direct_map"] == before["direct_map"]
        assert host.output(["rmmod", "offmap"]).status == 0
        assert not re.search(r"WARNING:|BUG:", host.output(["dmesg"]).stdout.decode())


@pytest.mark.parametrize(
    ("backend", "kills"),
    [("unplugged", 12), ("secretmem-bridge", 12), soak("unplugged", 60), soak("secretmem-bridge", 40)],
)
@pytest.mark.timeout(600)
def test_killed_at_any_moment_nothing_stays_out(
    lab_kernel: HostKernel, tmp_path: Path, backend: str, kills: int
) -> None:
    key = new_key()
    initrd = tmp_path / "guest.initramfs"
    initrd.write_bytes(guest_initramfs())
    with LabHost.start(lab_kernel, memory="1G", out=tmp_path) as host:
        insert(host, lab_module(lab_kernel), tmp_path)
        before = ask(host, "state")
        command = ["run", "--memory", backend, "--memory-size", "128M"]
        command += ["--kernel", str(lab_kernel.vmlinuz), "--initrd", str(initrd)]
        command += ["--cmdline", f"{CMDLINE} {canary_parameters(key, CANARIES)}"]
        done = host.output([sys.executable, "-m", "tests.lab.kill_target", str(kills), *command], cwd=ROOT)
        assert done.status == 0, done.stderr.decode()
        stages = {(out, ready) for out, ready in json.loads(done.stdout)["stages"]}
        # Some died before they had memory or while they got it, some with a guest that was booting or had booted.
        assert len(stages) >= 2, stages
        assert host.output(["cat", "/sys/class/misc/offmap/holders"]).stdout == b""
        after = ask(host, "state")
        assert (after["claimed"], after["offline"]) == ([], "")
        assert after["blocks"] == before["blocks"]
        assert after["memtypes"] == before["memtypes"]
        assert after["total_kib"] >= before["total_kib"]
        # No page is out of the direct map that was in it.
        assert sum(int(size) for size in after["direct_map"].values()) == sum(
            int(size) for size in before["direct_map"].values()
        )
        # Nor do any of the guests' canaries stand anywhere in memory. The control: those of the process that looks,
        # of the same key, are found, and in its own memory only.
        arguments = ["anon", str(key), "1", "--json", "--canary", str(key)]
        audit = prepared.run(host, "tests.lab.audit_target", *arguments)
        assert audit.stdout, audit.stderr
        hits = json.loads(audit.stdout)["scan"]["found"]
        assert len(hits) == CANARIES, hits
        assert all(place["in_guest"] for hit in hits for place in hit["places"]), hits
        assert host.output(["rmmod", "offmap"]).status == 0


QEMU = """
exec qemu-system-x86_64 -nodefaults -no-user-config -display none -accel kvm -m 256M \
    -object memory-backend-file,id=ram,size=256M,mem-path=/dev/offmap,share=on \
    -M {machine},memory-backend=ram -cpu host{features} \
    -kernel {kernel} -initrd {initrd} -append '{cmdline}' -serial stdio
"""


def test_unmodified_qemu_is_hidden(host: LabHost) -> None:
    assert host.options.out is not None
    initrd = host.options.out / "module-guest.initramfs"
    initrd.write_bytes(guest_initramfs())
    before = ask(host, "state")
    script = QEMU.format(
        machine="microvm,acpi=on",
        features="",
        kernel=host.kernel.vmlinuz,
        initrd=initrd,
        cmdline=f"{CMDLINE} reboot=t",
    )
    heard = bytearray()
    ready = threading.Event()

    def listen(data: bytes) -> None:
        heard.extend(data)
        if READY.encode() in heard:
            ready.set()

    vmm = host.popen(["sh", "-c", f"echo pid $$ >&2; {script}"], stdout=listen, stderr=listen, keep_stdin=True)
    try:
        assert ready.wait(scaled(PATIENCE)), heard
        found = re.search(rb"pid (\d+)", heard)
        assert found
        pid = int(found[1])
        maps = host.output(["grep", "/dev/offmap", f"/proc/{pid}/maps"]).stdout.decode().split()
        start, end = (int(part, 16) for part in maps[0].split("-"))
        assert end - start == SIZE
        done = prepared.run(host, "offmap", "audit", str(pid), "--json", "--range", f"{start:#x}:{end - start:#x}")
        result = json.loads(done.stdout)
        pages = result["pages"]
        assert (pages["pages_populated"], pages["unknown_pages"]) == (SIZE // 4096, 0)
        assert pages["direct_map_pages"] == 0
        # kvm-clock is on: KVM maps the page that the guest registered for it, and the audit names it.
        assert (done.status, pages["alias_pages"]) in ((0, 0), (1, 1), (1, 2)), result["aliases"]
        assert {alias["region"] for alias in result["aliases"]} <= {"vmalloc/ioremap space"}
    finally:
        vmm.kill()
        vmm.wait(scaled(PATIENCE))
    given_back(host, before)


@pytest.mark.slow
@pytest.mark.parametrize("series", [soak("6.1"), "7.3"])
def test_other_kernels(lab_kernel: HostKernel, series: str, tmp_path: Path) -> None:
    kernel = host_kernel(f"debian:{series}")
    with LabHost.start(kernel, memory="2G", cmdline=words_for(kernel), out=tmp_path) as host:
        insert(host, lab_module(kernel), tmp_path)
        test_what_is_out_is_gone_from_the_host_and_comes_back(host)
        test_what_comes_back_is_online_whatever_the_policy_for_new_memory(host)
        test_leftovers_are_zeroed_before_and_after(host)
        test_two_takers_get_disjoint_memory(host)
        test_hostile_use_is_refused(host)
        test_killed_while_it_gets_its_memory(host)
        test_secretmem_files_that_cannot_be_held_are_refused(host)
        for backend in ("unplugged", "secretmem-bridge"):
            check_guest_is_hidden(host, lab_kernel, tmp_path, backend)
        assert host.output(["rmmod", "offmap"]).status == 0
