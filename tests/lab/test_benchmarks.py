"""What benchmarks/ promises of `unplugged`, in few rounds: how soon it is there, and the page size a guest gets."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from offmap.compare.guest import READY, guest_initramfs
from offmap.kmod.lab_build import lab_module
from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel
from offmap.patience import scaled

from .conftest import RESERVED
from .console import PATIENCE, Guest
from .test_module import insert

pytestmark = pytest.mark.lab

POPULATE = Path(__file__).parents[2] / "benchmarks" / "populate.py"


@pytest.fixture(scope="module")
def host(lab_kernel: HostKernel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabHost]:
    """Give a host with the module loaded, in which no other test has split the direct map."""
    out = tmp_path_factory.mktemp("out")
    with LabHost.start(lab_kernel, memory="2G", cmdline=RESERVED, out=out) as host:
        insert(host, lab_module(lab_kernel), out)
        yield host
        assert host.output(["rmmod", "offmap"]).status == 0


def test_unplugged_is_there_in_a_third_of_memfds_time_and_the_direct_map_is_as_before(host: LabHost) -> None:
    module = lab_module(host.kernel)
    argv = [sys.executable, str(POPULATE), "--inside", "--place=stock", "--rounds=1", "--limit-rounds=5"]
    done = host.output([*argv, "--kind=unplugged", "--module", str(module)], timeout=scaled(PATIENCE))
    assert done.status == 0, done.stderr.decode()
    figures: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    limits = {figure["figure"]: figure["limit"]["met"] for figure in figures if "limit" in figure}
    assert limits == {
        "unplugged, from asking to zeroed and mapped": True,
        "direct map, what taking and giving back has changed": True,
    }, figures
    assert "unplugged, the module zeroes with one a CPU" in {figure["figure"] for figure in figures}


def test_the_page_size_of_the_nested_page_tables_is_told(host: LabHost) -> None:
    assert host.options.out is not None
    initrd, report = host.options.out / "pages-guest.initramfs", host.options.out / "pages.json"
    initrd.write_bytes(guest_initramfs())
    nested = {}
    for backend in ("unplugged", "memfd"):
        options = ("--memory", backend, "--initrd", str(initrd), "--stats", "--report", str(report))
        with Guest(host, host.kernel.vmlinuz, *options) as guest:
            guest.expect(READY)
            guest.keys("poweroff\n")
            assert guest.end() == 0, guest.errors
        nested[backend] = json.loads(report.read_text())["nested_pages"]
        told = [f"{count} x {size}" for size, count in nested[backend].items() if count]
        assert f"nested page tables: {', '.join(told)}\n" in guest.errors
    assert nested["unplugged"]["2M"] > 16  # a booted guest has touched more than 32 MiB
    assert nested["unplugged"]["4K"] < 512
    # The control: where the VMM's own mapping is of 4K pages, these are told.
    assert nested["memfd"]["4K"] > 16 * 512
    assert nested["memfd"]["2M"] == 0
