"""The audit of QEMU and of offmap on each kind of RAM, on three host kernels: what is exposed, hidden and planted."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from offmap.compare.guest import guest_initramfs
from offmap.kmod.lab_build import lab_module
from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel
from offmap.lab.provision import host_kernel
from offmap.patience import scaled

from .alias_module import alias_module
from .conftest import soak, words_for

pytestmark = [pytest.mark.lab, pytest.mark.slow]

TARGET = str(Path(__file__).with_name("audit_vmm_target.py"))
PAGES = (256 << 20) // 4096
VMALLOC = "vmalloc/ioremap space"
HIDDEN = ("offmap reserved", "offmap unplugged", "offmap secretmem-bridge")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("series", [soak("6.12"), soak("6.1"), "7.3"])
def test_vmms(lab_kernel: HostKernel, series: str, tmp_path: Path) -> None:
    kernel = host_kernel(f"debian:{series}")
    initrd = tmp_path / "guest.initramfs"
    initrd.write_bytes(guest_initramfs())
    for module in (lab_module(kernel), alias_module(kernel)):
        shutil.copy(module, tmp_path)
    with LabHost.start(kernel, memory="2G", cmdline=words_for(kernel), out=tmp_path) as host:
        for name in ("offmap", "offmap_alias"):
            assert host.output(["insmod", str(tmp_path / f"{name}.ko")]).status == 0
        host.output(["sh", "-c", "echo 1 > /proc/sys/kernel/kptr_restrict"])
        done = host.output([sys.executable, TARGET, str(lab_kernel.vmlinuz), str(initrd)], timeout=scaled(700))
        assert done.status == 0, done.stderr.decode()
        found = json.loads(done.stdout)
        assert not re.search(r"WARNING:|BUG:", host.output(["dmesg"]).stdout.decode())
    for name in found:
        assert "failed" not in found[name], (name, found[name])
    for name in ("qemu plain", "qemu memfd", "qemu hugetlb", "offmap anon", "offmap hugetlb"):
        check_exposed(found[name], name)
    for name in HIDDEN:
        check_hidden(found[name])
        check_planted(found[f"{name}, planted"], "vmap" if "bridge" in name else "memremap")
    for name in ("qemu hidden", "qemu unplugged"):
        check_firmware(found[name])
    assert found["qemu hidden, RAM"]["verdict"] == "hidden"
    check_planted(found["qemu hidden, planted"], "memremap")
    check_clock_page(found["qemu unplugged, RAM"])
    assert found["qemu unplugged, planted"]["pages"]["alias_pages"] >= 2 + 1


def check_exposed(result: Any, name: str) -> None:
    pages = result["pages"]
    vmm = name.partition(" ")[0]
    assert result["vmm"]["vmm"] == {"qemu": "QEMU", "offmap": "offmap"}[vmm]
    assert result["vmm"]["vms"] == 1
    assert result["every"] == [[True, result["vmm"]["vmm"]]]
    assert result["verdict"] == "exposed"
    assert pages["direct_map_pages"] == pages["pages_populated"] > 0
    assert (
        sum(total["pages"] for total in result["reach"] if total["kind"] == "direct_map") == pages["direct_map_pages"]
    )
    # QEMU tells nobody where its guest's RAM is; KVM knows.
    assert {part["source"] for part in result["ranges"]} == {"kvm" if vmm == "qemu" else "memslot"}, result["notes"]
    assert sum(part["bytes"] for part in result["ranges"]) >= 256 << 20
    if vmm == "qemu":
        assert pages["pages_populated"] >= PAGES  # prealloc=on


def check_hidden(result: Any) -> None:
    pages = result["pages"]
    assert result["verdict"] == "hidden", result
    assert (pages["mapped_pages"], pages["unknown_pages"]) == (0, 0)
    assert pages["pages_populated"] + pages["excluded_pages"] >= PAGES
    assert result["vmm"]["vmm"] == "offmap"
    assert {part["source"] for part in result["ranges"]} == {"memslot"}


def check_firmware(result: Any) -> None:
    """A microvm's firmware is in memory of its own that its guest can write to: KVM says so, and it is exposed."""
    assert {part["source"] for part in result["ranges"]} == {"kvm"}
    assert result["verdict"] == "exposed"
    ram = [(int(part["va"], 16), part["bytes"]) for part in result["ranges"] if part["backend"] == "/dev/offmap"]
    firmware = [(int(part["va"], 16), part["bytes"]) for part in result["ranges"] if part["backend"] != "/dev/offmap"]
    assert sum(size for _, size in ram) >= (256 << 20) - (1 << 20)
    direct = [(int(each["userspace_addr"], 16), each["bytes"]) for each in result["direct_map_ranges"]]
    assert direct
    assert all(any(start <= va < start + size for start, size in firmware) for va, _ in direct)
    assert not any(start <= va < start + size for start, size in ram for va, _ in direct)
    assert sum(size for _, size in direct) <= 2 << 20


def check_planted(result: Any, kind: str) -> None:
    assert result["verdict"] == "exposed"
    assert (result["pages"]["alias_pages"], result["pages"]["direct_map_pages"]) == (2, 0)
    assert {(alias["kind"], alias["region"]) for alias in result["aliases"]} == {(kind, VMALLOC)}
    caller = "offmap_alias" if kind == "vmap" else "memremap+"
    assert all(caller in alias["caller"] for alias in result["aliases"])


def check_clock_page(result: Any) -> None:
    """KVM maps the page that the guest registered for its clock, and nothing else of it is mapped."""
    pages = result["pages"]
    assert (pages["direct_map_pages"], pages["unknown_pages"]) == (0, 0)
    assert pages["pages_populated"] >= PAGES
    assert pages["alias_pages"] in {1, 2}
    assert result["verdict"] == "exposed"
    assert {(alias["kind"], alias["region"]) for alias in result["aliases"]} == {("memremap", VMALLOC)}
