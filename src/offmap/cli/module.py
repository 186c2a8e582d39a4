"""``offmap module``: build, load and unload the kernel module, and show the memory that it has taken."""

import argparse
import json
import os

from offmap.errors import ExitStatus, OffmapError
from offmap.units import format_size


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register ``offmap module`` and its own subcommands."""
    module = subparsers.add_parser(
        "module",
        description="The kernel module behind unplugged, pool and secretmem-bridge memory, and behind offmap wrap.",
    )
    commands = module.add_subparsers(metavar="COMMAND", required=True)
    build = commands.add_parser("build", help="build it for the running kernel and print its path")
    build.add_argument("--release", metavar="RELEASE", help="build for this kernel release, as uname -r prints it")
    build.add_argument("--again", action="store_true", help="build it even if it is built")
    build.set_defaults(run=run_build)
    load = commands.add_parser("load", help="load it; build it first if need be")
    load.set_defaults(run=run_load)
    unload = commands.add_parser("unload", help="unload it; refused while it has memory")
    unload.set_defaults(run=run_unload)
    status = commands.add_parser("status", help="show whether it is loaded, and who has how much of its memory")
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(run=run_status)


def run_build(args: argparse.Namespace) -> int:
    """Run ``offmap module build``."""
    from offmap.kmod.build import build

    print(build(args.release, again=args.again))
    return 0


def run_load(args: argparse.Namespace) -> int:
    """Run ``offmap module load``."""
    from offmap.kmod.build import build
    from offmap.kmod.loaded import load

    load(build())
    return 0


def run_unload(args: argparse.Namespace) -> int:
    """Run ``offmap module unload``."""
    from offmap.kmod.loaded import unload

    unload()
    return 0


def run_status(args: argparse.Namespace) -> int:
    """Run ``offmap module status``; status 2 if it is not loaded."""
    from offmap.kmod.build import built_module
    from offmap.kmod.loaded import holders, loaded_module
    from offmap.kmod.modinfo import modinfo

    module = built_module(os.uname().release)
    built = module.is_file()
    there = loaded_module()
    out = holders() if there else []
    current = bool(built and there and modinfo(module).get("srcversion") == there.srcversion)
    if args.json:
        result: dict[str, object] = {
            "loaded": there is not None,
            "version": there.version if there else None,
            "current": current,
            "built": str(module) if built else None,
            "holders": [{"pid": h.pid, "source": h.source, "bytes": h.size, "command": h.command} for h in out],
        }
        print(json.dumps(result, indent=2))
        return 0 if there else ExitStatus.FAILED
    if there is None:
        raise OffmapError("the module is not loaded", f"run: offmap module load{'' if built else ' (it builds it)'}")
    print(f"offmap {there.version} is loaded{'' if current else '; not the build of these sources'}")
    for holder in out:
        print(f"{format_size(holder.size):>12}  {holder.source:<10}  opened by {holder.command} ({holder.pid})")
    taken = sum(holder.size for holder in out if holder.source == "unplugged")
    print(f"{format_size(taken)} taken from the kernel")
    return 0
