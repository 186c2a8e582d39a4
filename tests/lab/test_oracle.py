"""drgn, asked in real kernels: it agrees on every kind of guest RAM."""

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from offmap.audit.canary import new_key
from offmap.compare.guest import READY, guest_initramfs
from offmap.kmod.lab_build import lab_module
from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel
from offmap.lab.provision import host_kernel
from offmap.patience import scaled

from . import prepared
from .conftest import soak, words_for
from .console import Guest
from .test_module import insert

pytestmark = pytest.mark.lab

MIB = 16
PAGES = (MIB << 20) // 4096
SAMPLE = ["--json", "--oracle", "drgn", "--oracle-sample", "300"]


def agreed(host: LabHost, kind: str, *statuses: int) -> Any:
    """Audit memory of one kind with drgn asked too; give its answer."""
    done = prepared.run(host, "tests.lab.audit_target", kind, new_key(), str(MIB), *SAMPLE)
    assert done.status in statuses, (done.stdout[-2000:], done.stderr)
    return check(json.loads(done.stdout))


def check(result: Any) -> Any:
    oracle = result["oracle"]
    assert (oracle["name"], oracle["pages"]) == ("drgn", 300)
    # The positive control of the questions themselves: they had answers of both kinds.
    assert oracle["mapped"] > 200 and oracle["unmapped"] > 100
    return oracle


@pytest.mark.parametrize(("kind", "status"), [("anon", 1), ("reserved", 0)])
def test_drgn_agrees_on_what_is_exposed_and_what_is_hidden(lab_host: LabHost, kind: str, status: int) -> None:
    # The frame of every page, too: of reserved memory, which pagemap does not show, drgn is the only other witness.
    assert agreed(lab_host, kind, status)["frames_agreed"] == 300


@pytest.mark.slow
@pytest.mark.parametrize("series", [soak("6.1"), soak("6.12"), "7.3"])
def test_drgn_agrees_on_every_kind_of_memory(lab_kernel: HostKernel, series: str, tmp_path: Path) -> None:
    kernel = host_kernel(f"debian:{series}")
    initrd = tmp_path / "guest.initramfs"
    initrd.write_bytes(guest_initramfs())
    with LabHost.start(kernel, memory="2G", cmdline=words_for(kernel), out=tmp_path) as host:
        insert(host, lab_module(kernel), tmp_path)
        for kind, statuses in (("anon", (1,)), ("secretmem", (0, 1)), ("reserved", (0,))):
            assert agreed(host, kind, *statuses)["frames_agreed"] == 300, kind
        host.output(["sh", "-c", "echo 16 > /proc/sys/vm/nr_hugepages"])
        assert agreed(host, "hugetlb", 1)["frames_agreed"] == 300
        host.output(["sh", "-c", "echo 0 > /proc/sys/vm/nr_hugepages"])
        with ExitStack() as stack:
            guests = {}
            for backend in ("unplugged", "secretmem-bridge", "reserved"):
                options = ("--memory", backend, "--initrd", str(initrd), "--cmdline", "console=ttyS0 quiet")
                guests[backend] = stack.enter_context(Guest(host, lab_kernel.vmlinuz, *options))
            for guest in guests.values():
                guest.expect(READY)
            # One audit of them all: most of the time that one takes is Python's and drgn's start.
            audit = [sys.executable, "-m", "offmap", "audit", "--all", *SAMPLE]
            done = host.output(audit, timeout=scaled(120.0))
            assert done.status == 0, (done.stdout.decode()[-2000:], done.stderr)
            results = {result["pid"]: result for result in json.loads(done.stdout)["vms"]}
            assert set(results) == {guest.pid for guest in guests.values()}
            for backend, guest in guests.items():
                oracle = check(results[guest.pid])
                # What the guest has not touched is not in the VMM's page tables (yet): that cannot be asked.
                assert oracle["frames_agreed"] > 30, backend
                assert oracle["frames_agreed"] + oracle["frames_unasked"] == 300, backend
                guest.keys("poweroff -f\n")
            for guest in guests.values():
                assert guest.end() == 0, guest.errors
