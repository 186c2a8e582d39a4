"""``offmap wrap``: any VMM, unchanged, its guest on hidden memory."""

import argparse

from offmap.cli.log import as_json
from offmap.errors import OffmapError


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``wrap``."""
    parser = subparsers.add_parser(
        "wrap",
        help="run any VMM with its guest on hidden memory",
        description="Run a VMM as it is, and place memory that the host kernel has no mapping of under its guest. "
        "What cannot be hidden is refused.",
        epilog="Exit status: the VMM's; 2 if it was not started.",
    )
    parser.add_argument(
        "--memory",
        default="unplugged",
        metavar="KIND[,OPTION=…]",
        help="what is placed: unplugged[,node=N], or pool[,path=FOLDER], for which no root is needed "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--on-exposed",
        choices=("kill", "warn"),
        default="kill",
        help="what to do with a VMM whose guest an audit finds exposed (default: %(default)s)",
    )
    parser.add_argument(
        "--on-undetermined",
        choices=("kill", "warn"),
        default="warn",
        help="what to do with a VMM that no audit could judge, as with an ordinary user's (default: %(default)s)",
    )
    parser.add_argument(
        "--trust-shared",
        action="store_true",
        help="replace shared files too: no other process uses them (vhost-user and virtiofs do)",
    )
    parser.add_argument(
        "--kvm-clock",
        choices=("off", "keep"),
        default="off",
        help="keep: the guest may use it, and one page stays exposed, which is told (default: %(default)s)",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- VMM …", help="the VMM and its arguments")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Become the VMM.

    Raises:
        OffmapError: it could not be started.
    """
    from offmap.wrap.policy import Policy
    from offmap.wrap.start import run as start

    argv = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not argv:
        raise OffmapError("no VMM to run", "write it after --: offmap wrap -- qemu-system-x86_64 …")
    policy = Policy(
        kill=args.on_exposed == "kill",
        kill_undetermined=args.on_undetermined == "kill",
        trust_shared=args.trust_shared,
        keep_clock=args.kvm_clock == "keep",
    )
    start(argv, args.memory, policy, verbose=getattr(args, "verbose", False), as_json=as_json())
