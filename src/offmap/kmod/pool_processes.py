"""The processes that map files of a pool, and the sizes of the pages by which KVM maps a guest of theirs.

KVM maps no larger pages than the process does: what it has by 2M pages, the process has by 2M pages or larger ones.
"""

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from offmap.audit.process import Process, process_ids
from offmap.errors import OffmapError
from offmap.kvm.stats import MappedPages

_KVM = Path("/sys/kernel/debug/kvm")
"""A folder for each VM, PID-FD (virt/kvm/kvm_main.c, kvm_create_vm_debugfs). Only root sees it."""


@dataclass(frozen=True, slots=True)
class PoolProcess:
    """One process.

    Attributes:
        name: the kernel's, of 15 characters at most.
        mapped: bytes of the pool's files.
        kvm: how KVM maps all of its guests' RAM now; None if it has no VM, or that cannot be seen from here.
    """

    pid: int
    name: str
    mapped: int
    kvm: MappedPages | None


def pool_processes(devices: Collection[str]) -> dict[str, list[PoolProcess]]:
    """Those that this user may look at, by the pool's device.

    Args:
        devices: of the pools (``MAJOR:MINOR``, as in offmap.pools.Pool).
    """
    found: dict[str, list[PoolProcess]] = {}
    for pid in process_ids():
        mapped: dict[str, int] = {}
        with suppress(OffmapError, OSError):
            with Process(pid) as process:
                for mapping in process.maps():
                    major, _, minor = mapping.device.partition(":")
                    device = f"{int(major, 16)}:{int(minor, 16)}"
                    if device in devices:
                        mapped[device] = mapped.get(device, 0) + mapping.size
            if not mapped:
                continue
            name = Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
            kvm = kvm_pages(pid)
            for device, size in mapped.items():
                found.setdefault(device, []).append(PoolProcess(pid, name, size, kvm))
    return found


def kvm_pages(pid: int, root: Path = _KVM) -> MappedPages | None:
    """How KVM maps the guests of a process now; None if it has none, or that cannot be seen from here."""
    totals = [0, 0, 0]
    seen = False
    for folder in root.glob(f"{pid}-*"):
        with suppress(OSError, ValueError):  # the VM may end meanwhile
            counts = [int((folder / f"pages_{size}").read_text()) for size in ("4k", "2m", "1g")]
            totals = [total + count for total, count in zip(totals, counts, strict=True)]
            seen = True
    return MappedPages(*totals) if seen else None
