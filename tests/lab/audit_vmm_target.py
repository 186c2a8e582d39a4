"""Audits of QEMU and of offmap, each with its guest on several kinds of RAM, run in a disposable host.

``audit_vmm_target.py KERNEL INITRD`` prints one JSON object: the audit of each VMM, by its name, and of some a second
one with a kernel mapping of two of its pages planted.
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from offmap.audit.audit import Snapshot, audit_process, snapshot_process
from offmap.audit.frames import POPULATED
from offmap.audit.result import AuditResult
from offmap.audit.vms import audit_every_vm
from offmap.compare.guest import READY
from offmap.compare.kinds import kind_of
from offmap.compare.vm_process import VmProcess
from offmap.compare.vmm_command import GuestSetup, qemu_ranges, vmm_command
from offmap.patience import scaled

PAGE = 4096
DEADLINE = scaled(120.0)
HUGE_PAGES = "/proc/sys/vm/nr_hugepages"

QEMU = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-accel", "kvm", "-m", "256M"]
QEMU_MEMORY = {
    "plain": "memory-backend-ram,id=ram,size=256M,prealloc=on",
    "memfd": "memory-backend-memfd,id=ram,size=256M,share=on,prealloc=on",
    "hugetlb": "memory-backend-memfd,id=ram,size=256M,share=on,prealloc=on,hugetlb=on,hugetlbsize=2M",
    "unplugged": "memory-backend-file,id=ram,size=256M,mem-path=/dev/offmap,share=on",
}
OFFMAP_MEMORY = ("anon", "hugetlb", "reserved", "unplugged", "secretmem-bridge")


def qemu(kind: str, kernel: str, initrd: str) -> list[str]:
    """A guest that boots on hidden RAM, where its clock page is of interest; on other RAM none runs at all."""
    command = [*QEMU, "-object", QEMU_MEMORY[kind], "-M", "microvm,acpi=on,memory-backend=ram", "-cpu", "host"]
    command += ["-kernel", kernel, "-initrd", initrd, "-append", "console=ttyS0 quiet reboot=t"]
    return [*command, *(("-serial", "stdio") if kind == "unplugged" else ("-S", "-qmp", "stdio"))]


def told(result: AuditResult) -> dict[str, Any]:
    document = result.to_json()
    wanted = (
        "verdict",
        "partial",
        "notes",
        "pages",
        "reach",
        "aliases",
        "direct_map_ranges",
        "ranges",
        "vmm",
        "seconds",
    )
    return {name: document[name] for name in wanted}


def planted(result: Snapshot, count: int, of_linux: bool) -> int:
    """Map some pages that no alias has by the test module; the fd that holds the mapping.

    Memory that has a struct page cannot be remapped, and other memory has none to be mapped by.
    """
    judged = result.judged
    here = (judged.state == POPULATED) & ~judged.excluded & (judged.reached == 0) & (judged.pages >= count)
    pa = int(judged.pfn[here][0]) * PAGE
    addresses = " ".join(hex(pa + n * PAGE) for n in range(count))
    words = f"vmap {addresses}" if of_linux else f"memremap {pa:#x} {count * PAGE}"
    fd = os.open("/dev/offmap-alias", os.O_WRONLY)
    os.write(fd, words.encode())
    return fd


def look(name: str, argv: list[str], ready: str, found: dict[str, Any]) -> None:
    """Start a VMM, audit it; and where it is hidden, once more with a mapping planted."""
    with tempfile.TemporaryDirectory() as folder, VmProcess(argv, Path(folder)) as vmm:
        said = vmm.wait_for(re.compile(ready), DEADLINE)
        if not re.search(ready, said):
            found[name] = {"failed": vmm.complaint(), "said": said[-2000:]}
            return
        result = snapshot_process(vmm.pid)
        found[name] = told(result.audit)
        every = audit_every_vm(lambda vm: snapshot_process(vm.pid))
        found[name]["every"] = [[each.pid == vmm.pid, each.vmm.vmm] for each in every.vms]
        ranges = qemu_ranges(vmm.pid, kind_of("qemu-unplugged")) if name.startswith("qemu") else None
        if ranges:
            result = snapshot_process(vmm.pid, ranges=ranges)
            found[f"{name}, RAM"] = told(result.audit)
        if not result.audit.pages.direct_map_pages:
            fd = planted(result, 2, name.endswith("bridge"))
            try:
                found[f"{name}, planted"] = told(audit_process(vmm.pid, ranges=ranges))
            finally:
                os.close(fd)


def main() -> int:
    kernel, initrd = sys.argv[1:3]

    def command(kind: str, folder: str) -> list[str]:
        return vmm_command(GuestSetup(kind_of(kind), Path(kernel), Path(initrd)), Path(folder))

    found: dict[str, Any] = {}
    for kind in QEMU_MEMORY:
        huge = kind == "hugetlb"
        if huge:
            Path(HUGE_PAGES).write_text("140")
        look(f"qemu {kind}", qemu(kind, kernel, initrd), READY if kind == "unplugged" else '"QMP"', found)
        if huge:
            Path(HUGE_PAGES).write_text("0")
    look("qemu hidden", command("qemu-unplugged", "."), READY, found)
    for kind in OFFMAP_MEMORY:
        if kind == "hugetlb":
            Path(HUGE_PAGES).write_text("140")
        with tempfile.TemporaryDirectory() as folder:
            look(f"offmap {kind}", command(kind, folder), READY, found)
        if kind == "hugetlb":
            Path(HUGE_PAGES).write_text("0")
    print(json.dumps(found))
    if "OFFMAP_OUT" in os.environ:
        Path(os.environ["OFFMAP_OUT"], "vmms.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
