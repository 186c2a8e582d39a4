"""What memfd_secret leaves behind on a stock kernel, looked for in a whole gigabyte: a canary in every page."""

import json
import sys
from pathlib import Path

import pytest

from offmap.audit.canary import new_key
from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel
from offmap.patience import scaled

pytestmark = [pytest.mark.lab, pytest.mark.slow]

TARGET = str(Path(__file__).with_name("alias_target.py"))
MIB = 1024
PAGES = (MIB << 20) // 4096
KERNEL_TEXT = "kernel text mapping"


def test_the_scan_finds_every_alias_and_nothing_in_what_the_guest_gets(lab_kernel: HostKernel) -> None:
    key = new_key()
    # A fresh host: pages freed from the kernel image are among the first to be handed out again.
    with LabHost.start(lab_kernel, memory="2560M", fresh=True) as host:
        done = host.output([sys.executable, TARGET, key, str(MIB)], timeout=scaled(240))
        assert done.status == 0, done.stderr.decode()
    result = json.loads(done.stdout)
    before, after = result["before"], result["after"]

    pages = before["pages"]
    assert (before["status"], before["verdict"]) == (1, "exposed")
    assert (pages["pages_populated"], pages["direct_map_pages"], pages["unknown_pages"]) == (PAGES, 0, 0)
    assert {alias["region"] for alias in before["aliases"]} == {KERNEL_TEXT}
    # The walk and the scan agree on each page: 918 of them, or thereabouts, on 6.12.
    aliased = {
        int(alias["pa"], 16) + offset for alias in before["aliases"] for offset in range(0, alias["bytes"], 4096)
    }
    assert len(aliased) == pages["alias_pages"] == pages["canaries_found"] > 100
    places = [place for hit in before["scan"]["found"] for place in hit["places"]]
    assert all(place["in_guest"] and place["region"] == KERNEL_TEXT for place in places)
    assert {int(place["pa"], 16) & ~0xFFF for place in places} == aliased

    pages = after["pages"]
    assert (after["status"], after["verdict"]) == (0, "hidden")
    assert pages["excluded_pages"] == pages["excluded_mapped_pages"] == len(aliased)
    assert pages["pages_populated"] == PAGES - len(aliased)
    assert (pages["mapped_pages"], pages["unknown_pages"], pages["canaries_found"]) == (0, 0, 0)
    assert after["scan"]["found"] == []
    # As much was read as before.
    assert after["scan"]["bytes_scanned"] >= before["scan"]["bytes_scanned"] - (64 << 20)
