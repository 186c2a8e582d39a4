"""What `offmap run` has imported by the time its guest runs: each module is time that every guest waits for."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from offmap.kvm import Kvm

# Run as `offmap run` is, but where its first vCPU would enter the guest.
SCRIPT = """
import os, sys
import offmap.cli.main
from offmap.vmm.vcpu_loop import VcpuLoop

def run(loop):
    os.write(1, " ".join(sys.modules).encode())
    os._exit(0)

VcpuLoop.run = run
sys.exit(offmap.cli.main.main(sys.argv[1:]))
"""

NOT_YET = {
    *("dataclasses", "inspect", "logging", "json", "socket", "selectors", "datetime", "pathlib", "shutil"),
    *("re", "argparse"),  # offmap.cli.plain
    *(("typing",) if sys.version_info < (3, 14) else ()),  # offmap.typed
    *("subprocess", "tempfile", "traceback", "urllib", "numpy", "msgspec", "jinja2", "rich"),
    *("offmap.audit", "offmap.compare", "offmap.guests", "offmap.kmod", "offmap.lab", "offmap.library"),
    *("offmap.report", "offmap.devices.virtio"),
}


@pytest.fixture
def monitor(payload: Callable[[str], Path], kvm: Kvm) -> Path:
    """Give a guest, where it can run."""
    return payload("monitor")


def imported(*arguments: str) -> set[str]:
    """The modules that are imported before the first KVM_RUN of ``offmap run`` with these arguments."""
    argv = [sys.executable, "-c", SCRIPT, "run", *arguments]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_a_start_imports_nothing_that_it_does_not_need(monitor: Path) -> None:
    found = imported("--kernel", str(monitor))
    assert "offmap.vmm.machine" in found
    assert sorted(NOT_YET & found) == []


def test_a_device_costs_its_own_modules(monitor: Path) -> None:
    found = imported("--kernel", str(monitor), "--rng")
    assert {"offmap.devices.virtio.rng", "offmap.devices.virtio.mmio"} <= found
    assert sorted((NOT_YET - {"offmap.devices.virtio"}) & found) == []
    assert not {"offmap.devices.virtio.net", "offmap.devices.virtio.blk", "offmap.devices.virtio.console"} & found
