"""The scan on real kernels: a secret is found wherever it was planted, and each place is named for what it is."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from offmap.lab.host import LabHost
from offmap.lab.provision import host_kernel

from .conftest import words_for

pytestmark = pytest.mark.lab

TARGET = str(Path(__file__).with_name("scan_target.py"))


def scan(host: LabHost) -> tuple[Any, Any]:
    """(what was planted, what the audit says) of one run of the target."""
    script = 'mkdir -p /run/scan && exec "$@"'
    done = host.output(["sh", "-c", script, "sh", sys.executable, TARGET, "/run/scan"])
    assert done.status == 1, (done.stdout.decode()[-2000:], done.stderr.decode())
    planted, _, result = done.stdout.decode().partition("\n")
    return json.loads(planted), json.loads(result)


def owners(result: Any, sort: str) -> list[Any]:
    return [place["owner"] for place in result["scan"]["places"] if place["owner"]["sort"] == sort]


def check(planted: Any, result: Any) -> None:
    places = result["scan"]["places"]
    assert result["verdict"] == "exposed"
    assert result["scan"]["secret_bytes"] == 100
    assert {place["region"] for place in places} <= {"direct mapping of all physical memory", "kernel text mapping"}

    # The VM's own pages: once within a page, once across two that are no neighbours in RAM.
    guest = [place for place in places if place["in_guest"]]
    assert {place["owner"]["userspace_addr"] for place in guest} == {planted["within"], planted["across"]}
    across = [place for place in guest if place["owner"]["userspace_addr"] == planted["across"]]
    assert all(place["pa2"] is not None for place in across)

    # Files: one on tmpfs, one on the root's file system (an overlay: named within the layer that it is in), and the one
    # that the secret was read from, which is told apart.
    files = {owner["name"].rpartition(" (")[0]: owner["file_offset"] for owner in owners(result, "page_cache")}
    assert files[planted["tmpfs"]] == planted["file_offset"]
    assert [offset for name, offset in files.items() if name.endswith(planted["disk"])] == [planted["file_offset"]]
    assert [place["owner"]["name"].partition(" (")[0] for place in places if place["source"]] == [planted["source"]]

    # Processes: the planter itself, and the one that was handed it.
    holders = {process["pid"] for owner in owners(result, "process") for process in owner["processes"]}
    assert {planted["pid"], planted["other"]} <= holders

    # A thread's kernel stack, as the scan would name it.
    assert planted["stack"]["sort"] == "kernel_stack"
    assert planted["stack"]["name"].endswith(f"({planted['pid']})")

    # The kernel's own: a key in kmalloc'ed memory, a pipe's page, and what a process that has ended left behind.
    assert any(owner["name"].startswith("kmalloc") for owner in owners(result, "slab"))
    assert owners(result, "kernel")
    assert owners(result, "free")


def test_secret_is_found_and_named_wherever_it_stands(lab_host: LabHost) -> None:
    check(*scan(lab_host))


@pytest.mark.slow
@pytest.mark.parametrize("release", ["debian:6.1", "debian:7.3"])
def test_the_same_on_other_kernels(release: str) -> None:
    kernel = host_kernel(release)
    with LabHost.start(kernel, memory="2G", cmdline=words_for(kernel)) as host:
        check(*scan(host))
