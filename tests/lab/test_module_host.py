"""The offmap module on a host that has to go on: what it must not lose, break or wait for while memory is taken."""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from offmap.kmod.lab_build import lab_module
from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel
from offmap.lab.provision import host_kernel
from offmap.patience import scaled

from . import prepared

pytestmark = pytest.mark.lab

TARGET = "tests.lab.module_host_target"
ROOT = Path(__file__).parents[2]
PATIENCE = 120.0  # seconds on an idle machine
BLOCK = 128 << 20
# A crash kernel is a part of RAM that the resource tree names, above what is taken.
CMDLINE = "crashkernel=64M secretmem.enable=1"
TROUBLE = re.compile(r"WARNING:|BUG:|lost until|cannot give|counts as RAM")


def insert(host: LabHost, out: Path) -> None:
    shutil.copy(lab_module(host.kernel), out / "offmap.ko")
    done = host.output(["insmod", str(out / "offmap.ko")])
    assert done.status == 0, done.stderr
    host.output(["sh", "-c", "mount -t debugfs debugfs /sys/kernel/debug 2>/dev/null"])


def ask(host: LabHost, *what: str) -> Any:
    done = prepared.run(host, TARGET, *what)
    assert done.status == 0, done.stderr
    return json.loads(done.stdout)


def log_of(host: LabHost) -> str:
    return host.output(["dmesg"]).stdout.decode()


def start(kernel: HostKernel, out: Path) -> LabHost:
    """Boot a host that has a DIMM beside the RAM that its boot memory map names, and load the module."""
    backend = "memory-backend-ram,id=dimm,size=256M"
    dimm = ("-m", "slots=1,maxmem=4G", "-object", backend, "-device", "pc-dimm,memdev=dimm")
    host = LabHost.start(kernel, memory="2G", accel="tcg", cmdline=CMDLINE, out=out, devices=dimm)
    insert(host, out)
    return host


@pytest.fixture(scope="module")
def host(lab_kernel: HostKernel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabHost]:
    with start(lab_kernel, tmp_path_factory.mktemp("out")) as host:
        yield host


def test_memory_that_a_vm_still_maps_stays_out_until_the_vm_ends(host: LabHost) -> None:
    found = ask(host, "alias")
    assert found["mapped"]  # the control: KVM maps the page of the clock
    assert found["still mapped"]
    assert found["while the VM lives"] == BLOCK
    assert found["others"] > 0
    assert not found["given to another"]
    assert (found["after"], found["mapped after"], found["claimed after"]) == (0, False, 0)


def test_no_huge_page_is_taken_from_the_administrator(host: LabHost) -> None:
    found = ask(host, "hugepages")
    assert found["counts"][0] > 0
    assert found["counts"] == [found["counts"][0]] * 3
    assert found["taken"] > 0


def test_the_reserve_and_the_limit_hold_against_many_takers_at_once(host: LabHost) -> None:
    found = ask(host, "limits")
    assert found["limit"]["holders"] == 2
    assert 0 < found["reserve"]["holders"] < 8
    # What else the host allocates meanwhile comes out of the reserve, and is a few MiB.
    assert found["reserve"]["left"] > -(32 << 20)


def test_what_has_no_right_or_no_sense_is_refused(host: LabHost) -> None:
    assert ask(host, "misuse") == {
        "a fresh file, unprivileged": 0,
        "a file with memory, unprivileged": 0,
        "huge secretmem": "ENODATA",
        "log": "0",  # nothing failed so that the kernel dumped a page, and no warning
    }


def test_the_resource_tree_names_all_parts_of_ram_at_any_time(host: LabHost) -> None:
    found = ask(host, "tree")
    assert found["seen"] > 10
    assert found["missing"] == 0
    assert found["same"]


def test_pages_that_cannot_be_moved_hold_nobody_up(host: LabHost) -> None:
    found = ask(host, "pinned")
    assert found["blocks"] > 8
    assert found["error"] in ("ETIMEDOUT", "ENOMEM")
    # Three seconds for all; without an end to it, offline_pages() goes on until the pins are gone.
    assert found["seconds"] < 60
    assert found["hibernation"] == "EBUSY"  # while somebody is getting memory
    assert found["shown"]  # progress, while it was served
    assert found["killed after"] < 60  # of the 300 s that its block had left
    assert found["left after"] < 60
    assert found["then"] == 2 * BLOCK


def test_tasks_that_get_no_processor_hold_nobody_up(host: LabHost) -> None:
    """Who never shows that he has done reading struct pages of what is offline does not stop it for ever."""
    found = ask(host, "starved")
    assert found["error"] == "ETIMEDOUT"
    assert found["seconds"] < 60  # two for all, and two for each block
    assert found["lost"] == {}  # what was offline is online again
    assert found["then"] == BLOCK


def test_memory_that_was_added_after_boot_or_cannot_move_is_not_tried(host: LabHost) -> None:
    found = ask(host, "untried")
    assert found["added"] == 2  # the control: there is some, and it is online
    assert found["taken"] > 0
    assert found["of it"] == 0
    assert found["secret"] == 0


def test_all_of_it_at_once_loses_nothing_and_holds_nobody_up(host: LabHost) -> None:
    """A short share of what can be run for long (docs/module.md)."""
    assert host.output(["modprobe", "hwpoison_inject"]).status == 0
    argv = [sys.executable, "-m", "tests.lab.module_stress_target", "0", "6", "--takes", "12"]
    done = host.output(argv, timeout=scaled(PATIENCE), cwd=ROOT)
    assert done.status == 0, done.stderr.decode()
    found = json.loads(done.stdout)
    # First what was wrong, as it ends the run; and all that is said, which pytest would shorten.
    assert (found["wrong"], found["changed"], found["holders"]) == ([], {}, []), done.stdout.decode()
    assert (found["left"], found["lost"], found["failed"]) == (0, 0, 0), done.stdout.decode()
    assert found["done"].pop("taker: taken") >= 12, done.stdout.decode()
    log = log_of(host)
    assert not TROUBLE.search(log), log


def test_pages_that_have_failed_stay_known_as_such(host: LabHost) -> None:
    check_failures(host, "mce")


def check_failures(host: LabHost, how: str) -> None:
    """Make pages fail before memory is taken, and one while it is out: the last that can be done with a host."""
    out = host.options.out
    assert out is not None
    assert host.output(["rmmod", "offmap"]).status == 0  # what came before has left nothing
    insert(host, out)
    found = ask(host, "poison")
    assert found["pages"] == found["failed"] == 3
    assert found["taken"] > 0
    assert (found["meanwhile"], found["after"], found["still poisoned"]) == (3, 3, 3)
    found = ask(host, "fail_while_out", how)
    assert found["signal"] == "SIGBUS"
    # Another page of the same memory is as it was. memory_failure() kills the process at once.
    assert found["other page"] == ("other" if how == "mce" else "")
    assert found["kept"] == str(BLOCK)
    assert (found["returning"], found["given to another"]) == ("0", "False")
    log = log_of(host)
    assert not TROUBLE.search(log), log


@pytest.mark.slow
@pytest.mark.parametrize("series", ["6.1", "7.3"])
def test_other_kernels(series: str, tmp_path: Path) -> None:
    with start(host_kernel(f"debian:{series}"), tmp_path) as host:
        test_memory_that_a_vm_still_maps_stays_out_until_the_vm_ends(host)
        test_no_huge_page_is_taken_from_the_administrator(host)
        test_the_reserve_and_the_limit_hold_against_many_takers_at_once(host)
        test_what_has_no_right_or_no_sense_is_refused(host)
        test_the_resource_tree_names_all_parts_of_ram_at_any_time(host)
        test_pages_that_cannot_be_moved_hold_nobody_up(host)
        test_memory_that_was_added_after_boot_or_cannot_move_is_not_tried(host)
        # memory_failure() finds memory without struct page from 7.0 on; a machine check is heard of everywhere.
        check_failures(host, "hard_offline" if series == "7.3" else "mce")
