"""``offmap image``: file systems for guests."""

import argparse
from pathlib import Path

from offmap.cli.log import quiet_in_a_file
from offmap.errors import ExitStatus, OffmapError
from offmap.log import Logger
from offmap.units import parse_size


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register ``offmap image`` and its subcommands."""
    image = subparsers.add_parser("image", description="Make guest file systems.")
    commands = image.add_subparsers(metavar="COMMAND", required=True)
    initramfs = commands.add_parser(
        "initramfs",
        help="a small busybox guest that gives a shell on its console",
        description="Write an initramfs: busybox, and an init that gives a shell on the console.",
    )
    initramfs.add_argument("file", type=Path, metavar="FILE", help="where to write it")
    initramfs.set_defaults(run=run_initramfs)
    build = commands.add_parser(
        "build",
        help="a Debian guest: kernel, initrd and root file system",
        description="Make a Debian image from this machine's own mirror: root.img (ext4), vmlinuz, initrd.img, and "
        "image.json, which says what is in it. Root has no password. It takes 20 seconds the first time.",
    )
    build.add_argument(
        "folder", type=Path, nargs="?", metavar="FOLDER", help="where to put it (default: in the cache, by its name)"
    )
    build.add_argument("--name", default="debian", help="its name in the cache, for run --image (default: %(default)s)")
    build.add_argument("--release", default="bookworm", help="the Debian release (default: %(default)s)")
    build.add_argument("--kernel", metavar="KERNEL", help="debian:6.1, debian:6.12, debian:7.3, … as for lab exec")
    build.add_argument("--include", default="", metavar="PACKAGE,…", help="packages to add to a minimal system")
    build.add_argument("--size", default="2G", metavar="SIZE", help="size of the root disk (default: %(default)s)")
    build.add_argument("--hostname", default="debian", metavar="NAME", help="the host name (default: %(default)s)")
    build.add_argument("--autologin", action="store_true", help="give a root shell on the console, without a login")
    build.set_defaults(run=run_build)


def run_build(args: argparse.Namespace) -> int:
    """Run ``offmap image build``. Raises OffmapError: the image cannot be made."""
    from offmap.guests.build import build_image
    from offmap.guests.image import named_image
    from offmap.guests.recipe import RootRecipe
    from offmap.lab.provision import host_kernel

    recipe = RootRecipe(
        args.release,
        tuple(filter(None, args.include.split(","))),
        parse_size(args.size),
        args.autologin,
        args.hostname,
    )
    folder = named_image(args.name) if args.folder is None else args.folder
    say = quiet_in_a_file(Logger("offmap.cli.image.build"))
    say("getting the kernel")
    kernel = host_kernel(args.kernel, say=say)
    say("making the root file system, unless the cache has it")
    image = build_image(recipe, kernel, folder)
    print(image.folder)
    return ExitStatus.DONE


def run_initramfs(args: argparse.Namespace) -> int:
    """Run ``offmap image initramfs``.

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
