"""The options that describe a disposable host, shared by the commands that start one."""

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from offmap.errors import OffmapError


def add_kernel_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name the kernel of a disposable host."""
    parser.add_argument(
        "--host-kernel",
        metavar="KERNEL",
        help="debian:6.12, patched:7.3, running, or a bzImage (default: debian:6.12 where apt is)",
    )
    parser.add_argument("--modules", type=Path, metavar="DIR", help="lib/modules/RELEASE folder of a bzImage")


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that describe the machine of a disposable host."""
    parser.add_argument("--memory", default="2G", metavar="SIZE", help="RAM of the host (default: %(default)s)")
    parser.add_argument(
        "--nodes", type=int, default=1, metavar="N", help="NUMA nodes that share this RAM (default: %(default)s)"
    )
    parser.add_argument("--host-cmdline", default="", metavar="TEXT", help="added to the host's kernel command line")
    parser.add_argument(
        "--accel",
        choices=("auto", "tcg", "kvm", "icount"),
        default="auto",
        help="default: KVM if a host really boots under it; icount: emulated, its clocks count instructions",
    )
    parser.add_argument("--console", type=Path, metavar="FILE", help="copy the host's kernel console to FILE")


def console_file(path: Path | None, stack: ExitStack) -> BinaryIO | None:
    """Open what --console names, for as long as `stack` lives; None if it was not given."""
    if path is None:
        return None
    try:
        return stack.enter_context(path.open("wb"))
    except OSError as error:
        raise OffmapError(f"cannot write {path}: {error.strerror}", "give --console another file") from error
