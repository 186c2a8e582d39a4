"""``offmap pool``: set hidden memory aside once, for VMMs that open it as files."""

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from offmap.hidden_files import DEFAULT_POOL
from offmap.units import format_size, parse_size, printable

if TYPE_CHECKING:
    from offmap.kmod.pool_processes import PoolProcess


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register ``offmap pool`` and its own subcommands."""
    pool = subparsers.add_parser(
        "pool",
        description="Memory that the module takes off the kernel once, and gives out as files by ordinary permissions.",
    )
    commands = pool.add_subparsers(metavar="COMMAND", required=True)
    create = commands.add_parser("create", help="take memory off the kernel and mount it")
    create.add_argument("size", metavar="SIZE", type=parse_size, help="how much, like 64G; whole memory blocks")
    create.add_argument("--node", metavar="N", type=int, help="of this NUMA node (default: of any)")
    create.add_argument("--user", default="", metavar="USER", help="owner of the folder (default: root)")
    create.add_argument("--group", default="", metavar="GROUP", help="its group, like kvm (default: root)")
    create.add_argument("--mode", default="1770", metavar="MODE", help="its permissions (default: %(default)s)")
    create.add_argument("--quota", default=0, metavar="SIZE", type=parse_size, help="of each user (default: no limit)")
    create.add_argument("--allow-nested", action="store_true", help="though a nested guest can crash this kernel")
    create.add_argument("--allow-vfio", action="store_true", help="reuse pages while VFIO devices are open")
    create.set_defaults(run=run_create)
    resize = commands.add_parser("resize", help="make it larger, or smaller by what is free")
    resize.add_argument("size", metavar="SIZE", type=parse_size, help="how much it is to have then")
    resize.set_defaults(run=run_resize)
    destroy = commands.add_parser("destroy", help="unmount it: all goes back to the kernel, zeroed")
    destroy.set_defaults(run=run_destroy)
    for command in (create, resize, destroy):
        command.add_argument("--path", default=DEFAULT_POOL, metavar="FOLDER", help="where (default: %(default)s)")
    status = commands.add_parser("status", help="each pool: how much is used, free, zeroed, held; who maps it")
    status.add_argument("--json", action="store_true", help="as JSON")
    status.set_defaults(run=run_status)


def run_create(args: argparse.Namespace) -> int:
    """Run ``offmap pool create``."""
    from offmap.errors import OffmapError
    from offmap.kmod.pool import create

    try:
        mode = int(args.mode, 8)
    except ValueError:
        raise OffmapError(f"{args.mode!r} is no mode", "write it as chmod does, like 1770") from None
    pool = create(
        args.path,
        args.size,
        node=args.node,
        user=args.user,
        group=args.group,
        mode=mode,
        quota=args.quota,
        allow_nested=args.allow_nested,
        allow_vfio=args.allow_vfio,
    )
    print(f"{format_size(pool.size)} at {args.path}")
    return 0


def run_resize(args: argparse.Namespace) -> int:
    """Run ``offmap pool resize``."""
    from offmap.kmod.pool import resize

    print(f"{format_size(resize(args.path, args.size).size)} at {args.path}")
    return 0


def run_destroy(args: argparse.Namespace) -> int:
    """Run ``offmap pool destroy``."""
    from offmap.kmod.pool import destroy

    destroy(args.path)
    return 0


def run_status(args: argparse.Namespace) -> int:
    """Run ``offmap pool status``; status 2 if there is no pool."""
    from offmap.errors import ExitStatus, OffmapError
    from offmap.kmod.pool_processes import pool_processes
    from offmap.pools import pools

    found = pools()
    using = pool_processes({pool.device for pool in found}) if found else {}
    if args.json:
        listed = [
            {**asdict(pool), "processes": [_process_facts(process) for process in using.get(pool.device, ())]}
            for pool in found
        ]
        print(json.dumps(listed, indent=2))
        return 0 if found else ExitStatus.FAILED
    if not found:
        raise OffmapError("there is no pool", "make one: offmap pool create SIZE")
    for pool in found:
        where = ", ".join(pool.paths) or f"device {pool.device}, mounted elsewhere"
        used = pool.size - pool.free - pool.cleaning - pool.held - pool.failed
        parts = {
            "used": used,
            "free": pool.free,
            "being zeroed": pool.cleaning,
            "held": pool.held,
            "failed": pool.failed,
        }
        shown = [f"{format_size(size)} {name}" for name, size in parts.items() if size or name in ("used", "free")]
        node = "" if pool.node is None else f", NUMA node {pool.node}"
        print(f"{where}: {format_size(pool.size)}{node}: {', '.join(shown)}, {pool.files} files")
        for process in using.get(pool.device, ()):
            print(f"  {_line(process)}")
    return 0


def _line(process: "PoolProcess") -> str:
    guest = "" if process.kvm is None else f"; KVM maps its guest's RAM by {process.kvm}"
    return f"process {process.pid} ({printable(process.name)}): {format_size(process.mapped)}{guest}"


def _process_facts(process: "PoolProcess") -> dict[str, object]:
    pages = None if process.kvm is None else process.kvm.by_size()
    return {"pid": process.pid, "name": process.name, "mapped": process.mapped, "kvm_pages": pages}
