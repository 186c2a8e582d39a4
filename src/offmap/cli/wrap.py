"""``offmap wrap``: any VMM, unchanged, its guest on hidden memory.

With options that are written out, `begin` starts the VMM without argparse: both the VMM and a guest wait for that.
"""

from offmap.cli.plain import PlainParser
from offmap.errors import OffmapError

TYPE_CHECKING = False  # importing `typing` takes a fifth of the start
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``wrap``."""
    parser = subparsers.add_parser(
        "wrap",
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
        default="kill",
        choices=("kill", "warn"),
        help="what to do with a VMM whose guest an audit finds exposed (default: %(default)s)",
    )
    parser.add_argument(
        "--on-undetermined",
        default="warn",
        choices=("kill", "warn"),
        help="what to do with a VMM that no audit could judge, as with an ordinary user's (default: %(default)s)",
    )
    parser.add_argument(
        "--kvm-clock",
        default="off",
        choices=("off", "keep"),
        help="keep: the guest may use it, and one page stays exposed, which is told (default: %(default)s)",
    )
    parser.add_argument(
        "--trust-shared",
        action="store_true",
        help="replace shared files too: no other process uses them (vhost-user and virtiofs do)",
    )
    # argparse.REMAINDER: its module is not imported here
    parser.add_argument("command", nargs="...", metavar="-- VMM …", help="the VMM and its arguments")
    parser.set_defaults(run=run)


def run(args: "argparse.Namespace") -> int:
    """Become the VMM. Raises OffmapError: it could not be started."""
    from offmap.cli.log import as_json

    argv = args.command[1:] if args.command[:1] == ["--"] else args.command
    return _become(argv, args, verbose=getattr(args, "verbose", False), as_json=as_json())


def begin(words: "Sequence[str]") -> None:
    """Become the VMM, if no word before it needs argparse; else return (a short form, ``--help``, a mistake).

    Args:
        words: what follows ``offmap wrap``.

    Raises:
        OffmapError: it could not be started.
    """
    if "--" not in words:
        return
    own = words.index("--")
    plain = PlainParser()
    add_parser(plain)  # type: ignore[arg-type]  # for argparse's subparsers
    args = plain.parse(words[:own])
    if args is not None and words[own + 1 :]:
        _become(words[own + 1 :], args, verbose=False, as_json=False)


def _become(argv: "Sequence[str]", args: "argparse.Namespace", *, verbose: bool, as_json: bool) -> int:
    from offmap.wrap.policy import Policy
    from offmap.wrap.start import run as start

    if not argv:
        raise OffmapError("no VMM to run", "write it after --: offmap wrap -- qemu-system-x86_64 …")
    policy = Policy(
        kill=args.on_exposed == "kill",
        kill_undetermined=args.on_undetermined == "kill",
        trust_shared=args.trust_shared,
        keep_clock=args.kvm_clock == "keep",
    )
    start(argv, args.memory, policy, verbose=verbose, as_json=as_json)
