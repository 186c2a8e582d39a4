"""What confines a process, as /proc tells it of real ones."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from offmap.audit import vmm_sandbox as module
from offmap.audit.process import Process
from offmap.audit.sandbox_result import LISTED, Descriptor, Seccomp, VmmSandbox
from offmap.audit.vmm_sandbox import vmm_sandbox

PROGRAM = """
import ctypes, os, sys, threading
{do}
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def doing(do: str) -> Iterator[VmmSandbox]:
    """What confines a process that has done this."""
    command = [sys.executable, "-c", PROGRAM.format(do=do)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/") as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        with Process(child.pid) as process:
            found = vmm_sandbox(process)
        assert found is not None
        yield found
        child.communicate(b"")


def test_an_ordinary_process_is_not_confined() -> None:
    with doing("") as found:
        assert found.uid == os.geteuid()
        assert (found.threads, found.kernel_threads) == (1, 0)
        assert (found.no_new_privs, found.seccomp, found.namespaces) == (False, Seccomp.NONE, ())
        assert "mnt" in found.shared_namespaces and "net" in found.shared_namespaces
        assert found.mounts and found.root
        assert found.descriptors == ()
        assert "no seccomp filter" in str(found) and "no namespace of its own" in str(found)
        if os.geteuid() == 0:
            assert "sys_admin" in found.capabilities
            assert found.dumpable is None


def test_the_least_confined_thread_counts() -> None:
    # Strict mode: the thread may read, write and exit.
    strict = "threading.Thread(target=lambda: (ctypes.CDLL(None).prctl(38, 1, 0, 0, 0), os.read(0, 1)), daemon=True)"
    with doing(
        f"thread = {strict}; thread.start()\nimport time\nwhile thread.is_alive() and 'NoNewPrivs:\\t1' not in "
        "open(f'/proc/self/task/{thread.native_id}/status').read(): time.sleep(0.01)"
    ) as found:
        assert found.threads == 2
        assert not found.no_new_privs


@pytest.mark.skipif(os.geteuid() != 0, reason="not root: another user id and namespaces were not looked at")
def test_a_confined_process() -> None:
    do = (
        "os.unshare = ctypes.CDLL(None).unshare; os.unshare(0x48000000)\n"  # CLONE_NEWNET | CLONE_NEWIPC
        "os.setresgid(7, 7, 7); os.setresuid(7, 7, 7); ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)\n"
        "ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)"
    )
    with doing(do) as found:
        assert (found.uid, found.capabilities, found.no_new_privs, found.dumpable) == (7, (), True, False)
        assert found.namespaces == ("ipc", "net")
        assert str(found).startswith("uid 7, no capabilities, no_new_privs, no seccomp filter, own namespaces ipc net")
    with doing("os.setresgid(7, 7, 7); os.setresuid(7, 7, 7); ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)") as found:
        assert found.dumpable


def test_descriptors_that_lead_further() -> None:
    do = "kept = [os.open('/proc', 0), os.open('/proc', 0o10000000), os.open('/dev/null', 2), os.memfd_create('x')]"
    with doing(do) as found:
        assert [(each.kind, each.link, each.access) for each in found.descriptors] == [
            ("directory", "/proc", "read"),
            ("directory", "/proc", "path"),
        ]
        assert "2 descriptors that lead further (directory)" in str(found)


def test_physical_memory_is_found_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PHYSICAL_MEMORY", {os.makedev(1, 3)})  # of /dev/null; lab tests have a /dev/mem
    with doing("kept = os.open('/dev/null', 2)") as found:
        assert Descriptor(3, "physical memory", "/dev/null", "both") in found.descriptors


def test_a_file_whose_file_system_may_not_answer_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOCAL", set[str]())
    with doing("kept = os.open('/', 0)") as found:
        assert ("not looked at", "/") in [(each.kind, each.link) for each in found.descriptors]
        assert "no descriptor that leads further, " in str(found)


def test_a_descriptor_that_is_closed_while_it_is_looked_at_hides_no_other() -> None:
    closed, kept = os.open("/dev/null", os.O_RDONLY), os.open("/", os.O_RDONLY)

    class Closes(Process):
        def open(self, name: str, flags: int = os.O_RDONLY) -> int:
            fd = super().open(name, flags)
            if name == f"fdinfo/{closed}":
                os.close(closed)
            return fd

    with Closes(os.getpid()) as process:
        found = vmm_sandbox(process)
    os.close(kept)
    assert found is not None and (kept, "directory") in [(each.fd, each.kind) for each in found.descriptors]


def test_a_long_list_is_cut_and_counted() -> None:
    with doing(f"kept = [os.open('/', 0) for _ in range({LISTED + 3})]") as found:
        assert (len(found.descriptors), found.descriptors_omitted) == (LISTED, 3)


def test_threads_of_the_kernel_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PF_USER_WORKER", 0xFFFFFFFF)
    with Process(os.getpid()) as process:
        assert vmm_sandbox(process) is None  # nothing else is there


def test_a_name_cannot_move_a_cursor(tmp_path: Path) -> None:
    folder = tmp_path / "\x1b[2Jx"
    folder.mkdir()
    with doing(f"kept = os.open({str(folder)!r}, 0)") as found:
        (descriptor,) = found.descriptors
    assert isinstance(descriptor, Descriptor)
    assert descriptor.link.isprintable()
