"""Synthetic results in the published form, for the renderers' tests."""

from typing import Any

from offmap.audit.result import Pages
from offmap.report.typed import decode

PAGE = 4096
DIRECT = 0xFFFF_8880_0000_0000
IMAGE = 0xFFFF_FFFF_8000_0000

Json = dict[str, Any]


def host(name: str = "host1", **changes: Any) -> Json:
    return {
        "kernel": "6.12.0",
        "cpu": "A CPU",
        "microcode": "0x1",
        "cmdline": "root=/dev/vda quiet",
        "memory_bytes": 2 << 30,
        "lab": True,
        "name": name,
    } | changes


def mapping(pa: int, size: int, *, alias: bool = False, **changes: Any) -> Json:
    return {
        "va": f"{(IMAGE if alias else DIRECT) + pa:#x}",
        "pa": f"{pa:#x}",
        "bytes": size,
        "kind": "kernel_image" if alias else "direct_map",
        "region": "kernel text mapping" if alias else "direct mapping of all physical memory",
        "page_size": PAGE if alias else 2 << 20,
        "writable": True,
        "executable": False,
        "userspace_addr": f"{0x7F00_0000_0000 + pa:#x}",
        "guest_phys_addr": None,
        "caller": "",
    } | changes


def cell(pa: int, size: int, *, direct: int = 0, alias: int = 0, unknown: int = 0, pages: int | None = None) -> Json:
    """Of `pages` guest pages (all that fit) some are mapped; the rest is hidden. Aliased ones are not direct ones."""
    guest = size // PAGE if pages is None else pages
    return {
        "pa": f"{pa:#x}",
        "bytes": size,
        "guest_pages": guest,
        "direct_map_pages": direct,
        "alias_pages": alias,
        "mapped_pages": direct + alias,
        "unknown_pages": unknown,
        "unmapped_pages": guest - direct - alias - unknown,
        "kinds": ["direct_map"] * bool(direct) + ["kernel_image"] * bool(alias),
    }


def total(pages: int, ranges: int = 1, *, alias: bool = False) -> Json:
    whole = mapping(0, PAGE, alias=alias)
    words = ("kind", "region", "page_size", "writable", "executable", "caller")
    return {word: whole[word] for word in words} | {"pages": pages, "ranges": ranges}


def pages(ram: int, **changes: Any) -> Json:
    return {
        "ram_pages": ram,
        "pages_populated": ram,
        "not_populated_pages": 0,
        "direct_map_pages": 0,
        "alias_pages": 0,
        "mapped_pages": 0,
        "unknown_pages": 0,
        "excluded_pages": 0,
        "excluded_mapped_pages": 0,
        "excluded_direct_pages": 0,
        "unknown_reasons": {},
        "canaries_found": None,
    } | changes


def page_counts(**counts: Any) -> Pages:
    """Counts that are 0 where nothing else is said."""
    return decode(Pages, pages(0) | {"pages_populated": 0} | counts)


def vmm(name: str = "QEMU") -> Json:
    return {"vmm": name, "executable": "/usr/bin/qemu-system-x86_64", "vms": 1, "vcpus": 2}


def vm(pid: int = 169, verdict: str = "hidden", *, ram: int = 65536, name: str = "host1", **changes: Any) -> Json:
    """A result of one VM: hidden, unless `changes` say something else."""
    return {
        "schema": "offmap-audit/2",
        "offmap": "0.1.0",
        "time": "2026-11-22T22:50:26Z",
        "host": host(name),
        "pid": pid,
        "process": "qemu-system-x86",
        "vmm": vmm(),
        "verdict": verdict,
        "notes": [],
        "partial": None,
        "pages": pages(ram),
        "ranges": [
            {
                "va": "0x7f0000000000",
                "bytes": ram * PAGE,
                "source": "memslot",
                "guest_phys_addr": 0,
                "backend": "unplugged",
            }
        ],
        "reach": [],
        "aliases": [],
        "aliases_omitted": 0,
        "direct_map_ranges": [],
        "direct_map_ranges_omitted": 0,
        "physical": {
            "ram": [["0x1000", "0x80000000"]],
            "cell_bytes": None,
            "cells": [cell(0x6000_0000, ram * PAGE)],
        },
        "sharing": None,
        "mapped_guest_ranges": [],
        "walk": {
            "levels": 4,
            "seconds": 0.034,
            "tables": {"4": 1, "3": 4, "2": 40, "1": 60},
            "runs": 900,
            "direct_map_bytes": {"4K": 20 << 20, "2M": 2028 << 20, "1G": 0},
            "unreadable": [],
        },
        "scan": None,
        "oracle": None,
        "seconds": 1.25,
    } | changes


def exposed(pid: int = 170, **changes: Any) -> Json:
    """A result of a VM with 100 of 256 pages mapped: 98 in the direct map, 2 in the kernel image."""
    settings: Json = {
        "pages": pages(
            256, pages_populated=180, not_populated_pages=76, direct_map_pages=98, alias_pages=2, mapped_pages=100
        ),
        "reach": [total(98), total(2, alias=True)],
        "aliases": [mapping(0x200_0000, 2 * PAGE, alias=True)],
        "direct_map_ranges": [mapping(0x4000_0000, 98 * PAGE)],
        "physical": {
            "ram": [["0x1000", "0x80000000"]],
            "cell_bytes": None,
            "cells": [
                cell(0x200_0000, 2 * PAGE, alias=2),
                cell(0x4000_0000, 98 * PAGE, direct=98),
                cell(0x5000_0000, 80 * PAGE),
            ],
        },
    }
    return vm(pid, "exposed", ram=256, **(settings | changes))


def unknown(pid: int = 171, **changes: Any) -> Json:
    """A result of a VM with 6 of 256 pages that could not be judged, the others not mapped."""
    settings: Json = {
        "pages": pages(256, pages_populated=250, unknown_pages=6, unknown_reasons={"swapped out": 6}),
        "physical": {"ram": [], "cell_bytes": None, "cells": [cell(0x5000_0000, 250 * PAGE)]},
        "notes": ["a note"],
    }
    return vm(pid, "unknown", ram=256, **(settings | changes))


def every_vm(*vms: Json, name: str = "host1", **changes: Any) -> Json:
    """A result of ``--all``."""
    statuses = {"hidden": 0, "exposed": 1, "unknown": 3}
    return {
        "schema": "offmap-audit-all/1",
        "offmap": "0.1.0",
        "time": "2026-11-22T22:50:26Z",
        "host": host(name),
        "exit_status": max((statuses[each["verdict"]] for each in vms), key=(0, 2, 3, 1).index, default=0),
        "vms": list(vms),
        "not_audited": [],
        "notes": [],
    } | changes


def not_audited(pid: int = 172, reason: str = "process 172 ended during the audit") -> Json:
    return {"pid": pid, "process": "crosvm", "vmm": vmm("crosvm"), "verdict": "unknown", "reason": reason}


def place(in_guest: bool) -> Json:
    return {
        "va": f"{DIRECT + 0x1000:#x}",
        "pa": "0x1000",
        "pa2": None,
        "region": "direct mapping of all physical memory",
        "in_guest": in_guest,
        "source": False,
        "owner": {
            "sort": "guest" if in_guest else "page_cache",
            "name": "" if in_guest else "/var/log/messages",
            "file_offset": None if in_guest else 4096,
            "processes": [],
            "guest_phys_addr": None,
            "userspace_addr": "0x7f0000001000" if in_guest else None,
        },
    }


def scan(found: int = 0, in_guest: bool = True) -> Json:
    return {
        "for": "canaries",
        "secret_bytes": None,
        "canaries_found": found,
        "bytes_scanned": 1 << 30,
        "bytes_unread": 4096,
        "frames_unread": 0,
        "threads": 2,
        "seconds": 3.2,
        "found": [{"canary": number, "places": [place(in_guest)]} for number in range(found)],
        "places": [],
    }
