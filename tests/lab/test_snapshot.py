"""Hosts that go on from a snapshot of a booted one: what differs between them, and what becomes of a bad one."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from offmap.lab.cache import cache_folder
from offmap.lab.command import Completed
from offmap.lab.errors import LabError, LabPanic
from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel
from offmap.lab.snapshot import Snapshots
from offmap.patience import Deadline

pytestmark = pytest.mark.lab

FACTS = "cat /proc/sys/kernel/random/boot_id; hostname; od -An -tx1 -N32 /dev/urandom; cat /proc/sys/kernel/random/uuid"
LAYOUT = "grep -w _text /proc/kallsyms; grep 'Kernel code' /proc/iomem"  # virtual and physical


@pytest.fixture
def own_cache(lab_kernel: HostKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Snapshots]:
    """An empty cache of snapshots, which the test may damage. The kernel is not looked for in it."""
    monkeypatch.setenv("OFFMAP_CACHE", str(tmp_path / "cache"))
    # Whether KVM works is known in the other cache.
    monkeypatch.setattr("offmap.lab.accel.choose", lambda *_: "tcg")
    yield Snapshots()
    shutil.rmtree(cache_folder("snapshots"))


def ask(host: LabHost, script: str) -> list[str]:
    done = host.output(["sh", "-c", script])
    assert done.status == 0, done
    return done.stdout.decode().splitlines()


def test_what_must_differ_does(own_cache: Snapshots, lab_kernel: HostKernel, tmp_path: Path) -> None:
    said: list[list[str]] = []
    layouts = set()
    outs = [tmp_path / "first", None, tmp_path / "third"]
    for out in outs:
        if out is not None:
            out.mkdir()
        with LabHost.start(lab_kernel, memory="512M", out=out) as host:
            said.append(ask(host, FACTS))
            layouts.add(tuple(ask(host, LAYOUT)))
            (now,) = ask(host, "date +%s.%N")
            drift = abs(float(now) - time.time())
            if out is not None:
                assert host.output(["sh", "-c", "echo kept > $OFFMAP_OUT/file"]) == Completed(0, b"", b"")
                assert (out / "file").read_text() == "kept\n"
            # The boot's own lines are there, whichever host's boot it was.
            assert "] " in host.console.text
            assert drift < 60, "the clock was not set"
    assert all(len(set(values)) == len(outs) for values in zip(*said, strict=True)), said
    assert len(layouts) == 1  # docs/lab.md says so; see --fresh
    (entry,) = own_cache.listed()
    assert entry.current
    with LabHost.start(lab_kernel, memory="512M", fresh=True) as host:
        assert tuple(ask(host, LAYOUT)) not in layouts


def test_a_damaged_one_is_made_anew(own_cache: Snapshots, lab_kernel: HostKernel) -> None:
    with LabHost.start(lab_kernel, memory="512M") as host:
        ask(host, "true")
    (entry,) = own_cache.listed()
    folder = own_cache.folder / entry.name
    first = (folder / "state").stat().st_ino
    state = bytearray((folder / "state").read_bytes())
    state[len(state) // 2] ^= 0xFF
    (folder / "state").write_bytes(state)
    with LabHost.start(lab_kernel, memory="512M") as host:
        ask(host, "true")
    assert (folder / "state").stat().st_ino != first


def test_one_that_qemu_refuses_is_dropped_and_the_host_boots(
    own_cache: Snapshots, lab_kernel: HostKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LabHost.start(lab_kernel, memory="512M"):
        (entry,) = own_cache.listed()
    real = Snapshots.open

    def empty_state(self: Snapshots, kind: object) -> object:
        opened = real(self, kind)  # type: ignore[arg-type]
        os.lseek(opened.state, 0, os.SEEK_END)  # as if it were cut short, behind the back of all checks
        return opened

    monkeypatch.setattr(Snapshots, "open", empty_state)
    with LabHost.start(lab_kernel, memory="512M") as host:
        ask(host, "true")
    assert entry.name not in [left.name for left in own_cache.listed()]


def test_one_that_panics_is_dropped_and_the_host_boots(
    own_cache: Snapshots, lab_kernel: HostKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LabHost.start(lab_kernel, memory="512M"):
        (entry,) = own_cache.listed()
    real, calls = LabHost.go, []

    def panics_once(self: LabHost, ends: Deadline | None) -> None:
        calls.append(self)
        if len(calls) == 1:
            raise LabPanic("Kernel panic - not syncing: of a snapshot")
        real(self, ends)

    monkeypatch.setattr(LabHost, "go", panics_once)
    with LabHost.start(lab_kernel, memory="512M") as host:
        ask(host, "true")
    assert len(calls) == 2 and entry.name in [left.name for left in own_cache.listed()]  # made anew


def test_who_ends_a_host_as_it_starts_loses_no_snapshot(own_cache: Snapshots, lab_kernel: HostKernel) -> None:
    with LabHost.start(lab_kernel, memory="512M"):
        (entry,) = own_cache.listed()
    started: list[LabHost] = []

    def end(host: LabHost) -> None:
        started.append(host)
        host.kill()

    with pytest.raises(LabError):
        LabHost.start(lab_kernel, memory="512M", on_launch=end)
    assert len(started) == 1 and [left.name for left in own_cache.listed()] == [entry.name]


def test_two_processes_that_start_at_once(own_cache: Snapshots, lab_kernel: HostKernel) -> None:
    program = (
        "import sys; from pathlib import Path; from offmap.lab.host import LabHost;"
        "from offmap.lab.kernel import HostKernel;"
        "kernel = HostKernel(*sys.argv[1:3], *map(Path, sys.argv[3:]));"
        "host = LabHost.start(kernel, memory='512M', accel='tcg');"
        "print(host.output(['uname', '-r']).stdout.decode(), end=''); host.close()"
    )
    words = [lab_kernel.name, lab_kernel.release, str(lab_kernel.vmlinuz), str(lab_kernel.modules)]
    both = [subprocess.Popen([sys.executable, "-c", program, *words], stdout=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate()[0].decode() for process in both]
    assert said == [f"{lab_kernel.release}\n"] * 2
    (entry,) = own_cache.listed()
    assert entry.current


def test_numa_nodes_and_two_at_a_time(own_cache: Snapshots, lab_kernel: HostKernel) -> None:
    with LabHost.start(lab_kernel, memory="512M", nodes=2) as first:
        with LabHost.start(lab_kernel, memory="512M", nodes=2) as second:
            ask(first, "dd if=/dev/zero of=/tmp/file bs=1M count=20 2>/dev/null")
            assert ask(second, "ls -d /sys/devices/system/node/node? | wc -l") == ["2"]
            assert ask(second, "ls /tmp/file 2>/dev/null || echo none") == ["none"]
        assert ask(first, "stat -c %s /tmp/file") == [str(20 << 20)]
