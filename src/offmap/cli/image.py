"""``offmap image``: file systems for guests."""

import argparse
from pathlib import Path

from offmap.errors import ExitStatus, OffmapError

__all__ = ["add_parser"]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``image``."""
    image = subparsers.add_parser(
        "image", help="make a file system for a guest", description="Make guest file systems."
    )
    commands = image.add_subparsers(metavar="COMMAND", required=True)
    initramfs = commands.add_parser(
        "initramfs",
        help="a small busybox guest that gives a shell on its console",
        description="Write an initramfs: busybox, and an init that gives a shell on the console.",
    )
    initramfs.add_argument("file", type=Path, metavar="FILE", help="where to write it")
    initramfs.set_defaults(run=run_initramfs)


def run_initramfs(args: argparse.Namespace) -> int:
    """Write it.

    Raises:
        OffmapError: no static busybox is installed, or the file cannot be written.
    """
    from offmap.compare.guest import guest_initramfs

    data = guest_initramfs()
    try:
        args.file.write_bytes(data)
    except OSError as error:
        raise OffmapError(f"cannot write {args.file}: {error.strerror}", "give another file") from None
    return ExitStatus.DONE
