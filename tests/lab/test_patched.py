"""The patched kernel: its patches one by one, then guests on the two kinds of RAM that need them."""

import json
import re
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from offmap.audit.verdict import Verdict
from offmap.compare.cell_result import CellOutcome, CellResult
from offmap.compare.claims import CANARIES, DemoRow
from offmap.compare.demo import PRESET, row_of
from offmap.compare.guest import READY, guest_initramfs
from offmap.compare.job import Job
from offmap.compare.knowledge import knowledge_of
from offmap.compare.spec import CellSpec
from offmap.compare.transcript import Transcript
from offmap.kmod.lab_build import lab_module
from offmap.lab.build import patched_kernel
from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel
from offmap.patience import scaled

from . import prepared
from .alias_module import skip_module
from .console import PATIENCE, Guest

# The first test may have to build the kernel.
pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("secretmem", "unmapped")
BACKENDS = ("secretmem", "guest_memfd-unmapped")
TARGET = "tests.lab.patched_target"
BLOCKS = "tests.lab.patched_blocks_target"
BY_GUP = (
    *("O_DIRECT write", "O_DIRECT read", "process_vm_readv", "process_vm_writev", "vmsplice"),
    *("io_uring fixed buffer", "/proc/self/mem read", "/proc/self/mem write"),
)


@pytest.fixture(scope="module")
def patched_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabHost]:
    """Give a disposable host that runs the patched kernel."""
    kernel = patched_kernel("patched:7.3")
    with LabHost.start(kernel, memory="2G", out=tmp_path_factory.mktemp("patched")) as host:
        yield host


@pytest.fixture(scope="module")
def initrd(patched_host: LabHost) -> Path:
    """Give the small guest's initramfs, where the host can see it."""
    assert patched_host.options.out is not None
    path = patched_host.options.out / "guest.initramfs"
    path.write_bytes(guest_initramfs())
    return path


@pytest.fixture(scope="module")
def guest_kernel(patched_host: LabHost, lab_kernel: HostKernel) -> Path:
    """Give the guest's kernel, where the host can see it."""
    assert patched_host.options.out is not None
    return Path(shutil.copy(lab_kernel.vmlinuz, patched_host.options.out / "guest-kernel"))


@pytest.fixture(autouse=True)
def nothing_went_wrong(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check after each test that the host's kernel has warned of nothing."""
    yield
    if "patched_host" in request.fixturenames:
        host: LabHost = request.getfixturevalue("patched_host")
        log = host.output(["dmesg"]).stdout.decode()
        assert not re.search(r"\b(WARNING|BUG|Oops|rcu: INFO|soft lockup)\b", log), log


def target(host: LabHost, what: str, kind: str = "", program: str = TARGET) -> Any:
    done = prepared.run(host, program, what, kind, seconds=PATIENCE)
    assert done.status == 0, done.stderr
    return json.loads(done.stdout)


def test_it_has_what_the_comparison_asks_of_a_kernel(patched_host: LabHost) -> None:
    """What it lacked would be a refusal of the configuration, and say nothing of the memory."""
    script = """
        modprobe -a tun vhost_net vhost_vsock brd || exit 1
        for device in net/tun vhost-net vhost-vsock ram0; do test -c /dev/$device -o -b /dev/$device || exit 2; done
        grep -qw disk /sys/power/state && ! grep -q disabled /sys/power/disk || exit 3
        grep -q kexec_file_load /proc/kallsyms || exit 4
    """
    done = patched_host.output(["sh", "-c", script], timeout=scaled(PATIENCE))
    assert done.status == 0, (done.status, done.stderr)
    module = lab_module(patched_host.kernel)
    done = patched_host.output(["sh", "-c", f"insmod {module} && test -c /dev/offmap && rmmod offmap"])
    assert done.status == 0, done.stderr
    # The image has no BTF; what is compiled from its headers says all that an attack reads.
    known = msgspec.json.decode(knowledge_of(patched_host.kernel))
    assert known["offsets"].keys() > {"kvm_memory_slot.gmem.file", "kvm_vcpu.arch.root_mmu.root.hpa", "task_struct.mm"}
    assert set(known["sizes"]) == {"page", "xa_node", "kvm", "kvm_vcpu"}


@pytest.mark.parametrize("kind", KINDS)
def test_everything_but_kvm_is_refused(patched_host: LabHost, kind: str) -> None:
    result = target(patched_host, "refusals", kind)
    assert {name: result.pop(name) for name in BY_GUP} == {
        name: "EIO" if name.startswith("/proc") else "EFAULT" for name in BY_GUP
    }
    assert result == {"read": "", "write": ""}  # by user address


def test_the_same_calls_work_on_plain_memory(patched_host: LabHost) -> None:
    assert set(target(patched_host, "refusals", "memfd").values()) == {""}


@pytest.mark.parametrize("kind", KINDS)
def test_the_direct_map_comes_back_whatever_the_end(patched_host: LabHost, kind: str) -> None:
    result = target(patched_host, "restored", kind)
    pages = result.pop("pages")
    assert pages == 2048
    expected = {"used": 0, "closed": pages, "held": 0, "killed": pages}
    if kind == "unmapped":
        expected |= {"punched": pages // 2, "not punched": 0}
    assert result == expected


def test_plain_memory_is_mapped_all_along(patched_host: LabHost) -> None:
    assert set(target(patched_host, "restored", "memfd").values()) == {2048}


def test_pages_are_zeroed_before_the_next_file_has_them(patched_host: LabHost) -> None:
    result = target(patched_host, "reused", program=BLOCKS)
    assert result["again"] > 0  # pages that two files have had, one after the other
    assert result == {"again": result["again"], "not zero": 0, "flushes": 1}


def test_the_direct_map_is_not_split(patched_host: LabHost) -> None:
    """A hundred files of changing size, by fault and by fallocate: what leaves as 2 MiB comes back as 2 MiB."""
    result = target(patched_host, "split", program=BLOCKS)
    assert result["meanwhile"] >= 2 << 10  # KiB: the control, a block was off
    assert result["more in 4K pages"] == 0


def test_faults_holes_guests_and_failures_at_once_lose_nothing(patched_host: LabHost) -> None:
    assert target(patched_host, "races", "3", BLOCKS) == {"said": "", "lost": 0}


@pytest.mark.parametrize("kind", KINDS)
def test_mappings_can_be_populated(patched_host: LabHost, kind: str) -> None:
    assert target(patched_host, "populated", kind, BLOCKS) == {
        "MADV_POPULATE_READ": "",
        "MADV_POPULATE_WRITE": "",
        "there": 512,
    }


def test_a_poisoned_page_comes_back_only_when_it_is_good_again(patched_host: LabHost) -> None:
    result = target(patched_host, "poisoned")
    others = result.pop("pages") - 1
    assert result == {
        "poisoned": 0,
        "others": 0,
        "poisoned, closed": 0,
        "others, closed": others,
        "unpoisoned": 1,
    }


def test_populating_flushes_once_in_2_mib(patched_host: LabHost) -> None:
    result = target(patched_host, "populating", program=BLOCKS)
    flushes = {name: statistics.median(each[1] for each in runs) for name, runs in result.items()}
    for way in ("flagged", "flagged, by faults"):
        assert 0.9 / 512 < flushes[way] - flushes["plain"] < 1.1 / 512, flushes


def test_no_processor_keeps_a_tlb_entry_and_one_is_seen_if_the_flush_is_taken_out() -> None:
    """Emulated processors have a TLB each, and keep what they are not told to drop."""
    kernel = patched_kernel("patched:7.3")
    with LabHost.start(kernel, memory="2G", devices=("-smp", "2")) as host:
        assert target(host, "stale", "memfd", BLOCKS) == 1024  # the control: what is mapped is read
        assert [target(host, "stale", kind, BLOCKS) for kind in KINDS] == [0, 0]
        calls = target(host, "flush_calls", program=BLOCKS)
        done = host.output(["insmod", str(skip_module(kernel)), f"calls={','.join(map(str, calls))}"])
        assert done.status == 0, done.stderr
        for kind in KINDS:
            assert target(host, "stale", kind, BLOCKS) > 0, kind
        assert host.output(["rmmod", "offmap_skip"]).status == 0
        assert target(host, "stale", KINDS[0], BLOCKS) == 0


@pytest.mark.parametrize("kind", ("memfd", *KINDS))
def test_a_clock_is_kept_at_a_good_address_and_a_bad_one_harms_nobody(patched_host: LabHost, kind: str) -> None:
    result = target(patched_host, "clock", kind)
    assert len(result) == 10
    for name, seen in result.items():
        assert seen["halted"], name
        if name.startswith("good"):
            assert seen["version"] and seen["version"] % 2 == 0, name
            assert seen["multiplier"], name


def rows(host: LabHost, kernel: Path, initrd: Path, clock: str, *backends: str) -> dict[str, DemoRow]:
    """What the demonstration's program says of each backend."""
    found = {}
    for backend in backends:
        spec = CellSpec(backend, kvm_clock=clock)
        job = Job(spec, str(kernel), str(initrd), str(host.options.out), preset=PRESET)
        argv = [sys.executable, "-m", "offmap.compare.measure", msgspec.json.encode(job).decode()]
        transcript = Transcript(lambda _: None)
        done = host.output(argv, timeout=3 * scaled(PATIENCE))
        assert done.status == 0, done.stderr.decode()
        transcript.feed(done.stdout)
        said = transcript.said()
        assert said.outcome is not None and not said.complaint, said
        answers = tuple(said.answers.values())
        found[backend] = row_of(CellResult(spec=spec, outcome=said.outcome, reason=said.reason, answers=answers))
    return found


@pytest.mark.parametrize("clock", ["off", "on"])
def test_guests_boot_and_are_hidden(patched_host: LabHost, guest_kernel: Path, initrd: Path, clock: str) -> None:
    for name, row in rows(patched_host, guest_kernel, initrd, clock, *BACKENDS).items():
        assert (row.outcome, row.verdict) == (CellOutcome.BOOTED, Verdict.HIDDEN), (name, row)
        assert row.pages_populated == row.ram_pages == 65536, (name, row)
        assert row.direct_map_pages == row.alias_pages == row.unknown_pages == 0, (name, row)
        assert (row.canaries_planted, row.canaries_found) == (CANARIES, 0), (name, row)


def test_the_same_guest_is_exposed_on_plain_guest_memfd(
    patched_host: LabHost, guest_kernel: Path, initrd: Path
) -> None:
    (row,) = rows(patched_host, guest_kernel, initrd, "auto", "guest_memfd").values()
    assert (row.outcome, row.verdict) == (CellOutcome.BOOTED, Verdict.EXPOSED), row
    assert row.canaries_found == CANARIES, row


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_guest_keeps_time_by_kvm_clock_and_stays_hidden(
    patched_host: LabHost, guest_kernel: Path, initrd: Path, backend: str
) -> None:
    options = ("--initrd", str(initrd), "--cmdline", "console=ttyS0 quiet", "--memory", backend, "--kvm-clock", "on")
    with Guest(patched_host, guest_kernel, *options, "--vcpus", "2", "--audit") as guest:
        guest.expect(READY)
        clock = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
        assert guest.shell(f"cat {clock}") == "kvm-clock"
        # This kernel has no BTF, so that KVM's own list cannot be read. Of what is named the verdict is as it was.
        guest.expect_error("^UNKNOWN: ")
        # What reclaims and moves memory leaves a guest's alone.
        guest.shell("dd if=/dev/urandom of=/kept bs=1M count=32 2>/dev/null; sync")
        before = guest.shell("sha256sum /kept")
        churn = "echo 3 >/proc/sys/vm/drop_caches; echo 1 >/proc/sys/vm/compact_memory"
        assert patched_host.output(["sh", "-c", churn]).status == 0
        assert guest.shell("sha256sum /kept") == before
        audit = [sys.executable, "-m", "offmap", "audit", str(guest.pid), "--json"]
        told = patched_host.output(audit, timeout=scaled(PATIENCE))
        assert told.status == 3, told.stdout.decode()
        result = json.loads(told.stdout)
        assert any("list of VMs could not be read" in note for note in result["notes"]), result
        named = [word for part in result["ranges"] for word in ("--range", f"{part['va']}:{part['bytes']}")]
        again = patched_host.output([*audit, *named], timeout=scaled(PATIENCE))
        assert (again.status, json.loads(again.stdout)["verdict"]) == (0, "hidden"), again.stdout.decode()
        now = int(patched_host.output(["date", "+%s"]).stdout)
        assert abs(int(guest.shell("date +%s")) - now) <= 3
        guest.keys("poweroff -f\n")
        assert guest.end() == 3, guest.errors


def test_a_device_write_straight_after_an_exception_reaches_the_device(patched_host: LabHost) -> None:
    """What newer KVM takes for an event that cannot be delivered, on an emulated processor (VcpuLoop)."""
    program = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "tests/kvm/test_vcpu_loop.py"]
    done = patched_host.output([*program, "-k", "exception"], cwd=ROOT, timeout=scaled(PATIENCE))
    assert done.status == 0, done.stdout.decode()
    assert b"1 passed" in done.stdout


def test_a_stock_kernel_gives_neither(lab_host: LabHost, lab_kernel: HostKernel) -> None:
    for options, why in (
        (("--memory", "guest_memfd-unmapped"), "guest_memfd"),
        (("--memory", "secretmem", "--kvm-clock", "on"), "kvm-clock cannot be offered on secretmem memory"),
    ):
        argv = [sys.executable, "-m", "offmap", "run", "--kernel", str(lab_kernel.vmlinuz), *options]
        done = lab_host.output(argv, timeout=scaled(PATIENCE))
        assert (done.status, done.stderr.count(b"\n")) == (2, 1), done.stderr
        assert why in done.stderr.decode()
