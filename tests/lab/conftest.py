"""Disposable hosts for tests: one that serves the whole session, and the kernel for those that need their own."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel
from offmap.lab.provision import host_kernel
from offmap.lab.qemu import QEMU

LONGEST_FIRST = (
    *("test_patched", "test_debian", "test_examples", "test_measure", "test_module", "test_kvm_attacks"),
    *("test_readme", "test_audit_vmm", "test_compare", "test_attack", "test_wrap", "test_audit", "test_access_log"),
    *("test_network", "test_oracle", "test_house", "test_run", "test_virtio", "test_wrap_firecracker", "test_pool"),
)
"""Files that take long; the others are short. The last file to begin is to be a short one, lest a processor be idle."""

RESERVED = "memmap=256M$0x60000000"  # RAM that the host kernel never owns: what the backend `reserved` needs


def words_for(kernel: HostKernel) -> str:
    """The command line of a host with 2 GiB that has every kind of RAM: the same in all files, for one snapshot."""
    # Secret memory is off by default before 6.5.
    before = tuple(map(int, kernel.release.split(".")[:2])) < (6, 5)
    return f"{RESERVED} secretmem.enable=1" if before else RESERVED


def soak(*values: object) -> pytest.ParameterSet:
    """Give parameters of a test with which it does not run in ``make test-all``, but in ``make soak``."""
    return pytest.param(*values, marks=(pytest.mark.slow, pytest.mark.soak))


def keep_still(host: LabHost) -> None:
    """Have khugepaged sleep. A small VM's memory that it moves during an audit is, rightly, not judged by that."""
    file = "/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs"
    assert host.run(["sh", "-c", f"echo 3600000 >{file}"]) == 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files of this folder in the order of LONGEST_FIRST, after all other tests."""
    ranks = {name: rank for rank, name in enumerate(LONGEST_FIRST)}
    here = Path(__file__).parent
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)) if item.path.parent == here else -1)


@pytest.fixture(scope="session")
def lab_kernel() -> HostKernel:
    """Give the kernel that lab hosts run (and, in them, guests)."""
    # make test has installed it: there, its absence is a failure and no reason to skip.
    if not shutil.which(QEMU) and not os.environ.get("OFFMAP_NO_SKIP"):
        pytest.skip(f"no {QEMU}: nothing that needs a host of its own is tested (install qemu-system-x86)")
    return host_kernel()


@pytest.fixture(scope="session")
def lab_host(lab_kernel: HostKernel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabHost]:
    """Give the host that all tests share: 2 GiB of RAM, 256 MiB of it reserved, an output folder.

    A test must leave it as it found it, and must not crash it. Files made on this machine after its start may not be
    seen in it, except in its output folder (``lab_host.options.out``).
    """
    with LabHost.start(lab_kernel, memory="2G", cmdline=RESERVED, out=tmp_path_factory.mktemp("out")) as host:
        keep_still(host)
        yield host


@pytest.fixture
def lab_out(lab_host: LabHost) -> Path:
    """Give the shared host's output folder, writable on both sides at the same path."""
    assert lab_host.options.out is not None
    return lab_host.options.out
