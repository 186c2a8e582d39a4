"""The kernel's own tests, on the patched kernel and on the stock kernel."""

import json
import shutil

import pytest

from offmap.cli.main import main
from offmap.lab.qemu import QEMU

# The first test may have to build the kernel.
pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(1800)]

# Each fails on a kernel without the series.
MEMORY = ("guest_memfd_hva_no_direct_map", "memfd_secret")
OURS = (
    *("mm/memfd_secret", "kvm/guest_memfd_test", "kvm/guest_memfd_race_test"),
    "kvm/demand_paging_test -b 16M -s guest_memfd_no_direct_map",
    "kvm/memslot_modification_stress_test -b 16M -s guest_memfd_no_direct_map",
    *(f"kvm/{test}_test -b 16M -s {kind}" for test in ("kvm_page_table", "dirty_log_perf") for kind in MEMORY),
    "kvm/demand_paging_test -b 16M -s memfd_secret",
    "kvm/dirty_log_test -i 2 -M clear-log -s guest_memfd_hva_no_direct_map",
    "kvm/memslot_perf_test -l 1 -t 100 -s 10 -f 2 -e 3 -b memfd_secret",
)
OTHERS = (
    *("mm/madv_populate", "mm/map_populate", "mm/mlock2-tests", "mm/process_madv", "mm/memory-failure"),
    *("kvm/pre_fault_memory_test", "kvm/steal_time", "kvm/x86/kvm_clock_test"),
    # The same options, with memory that the series leaves alone.
    *("kvm/demand_paging_test -b 16M -s guest_memfd", "kvm/kvm_page_table_test -b 16M -s guest_memfd_hva"),
)


@pytest.mark.skipif(not shutil.which(QEMU), reason=f"no {QEMU}: the kernel's own tests are not run")
def test_what_passes_on_the_stock_kernel_passes_on_the_series(capfd: pytest.CaptureFixture[str]) -> None:
    status = main(["lab", "selftests", "--host-kernel", "patched:7.3", "--json", *OURS, *OTHERS])
    said = capfd.readouterr()
    assert status == 0, said
    result = json.loads(said.out)
    assert not any(test["worse"] for test in result["tests"])
    found = {test["name"]: (test["stock"], test["kernel"]) for test in result["tests"]}
    assert list(found) == [*OURS, *OTHERS]
    for name in OURS:
        assert [run["outcome"] for run in found[name]] == ["fail", "ok"], found[name]
    passed = [name for name in OTHERS if found[name][0]["outcome"] == "ok"]
    # Pages of files in a host's overlay are not found again after they have failed: that test fails on both.
    assert set(OTHERS) - set(passed) <= {"mm/memory-failure"}, found
    assert all(found[name][1]["outcome"] == "ok" for name in passed), found
