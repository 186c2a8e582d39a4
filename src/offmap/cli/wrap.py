"""``offmap wrap``: any VMM, unchanged, its guest on hidden memory.

With options that are written out, `begin` starts the VMM without argparse: both the VMM and a guest wait for that.
"""

from offmap.errors import OffmapError

TYPE_CHECKING = False  # importing `typing` takes a fifth of the start
if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence


class _Option:
    """An option with a value."""

    def __init__(self, default: str, text: str, *, choices: "Sequence[str] | None" = None, metavar: str = "") -> None:
        self.default = default
        self.help = f"{text} (default: {default})"
        self.choices = choices
        self.metavar = metavar or None


_TRUST_SHARED = "--trust-shared"
_OPTIONS = {
    "--memory": _Option(
        "unplugged",
        "what is placed: unplugged[,node=N], or pool[,path=FOLDER], for which no root is needed",
        metavar="KIND[,OPTION=…]",
    ),
    "--on-exposed": _Option(
        "kill", "what to do with a VMM whose guest an audit finds exposed", choices=("kill", "warn")
    ),
    "--on-undetermined": _Option(
        "warn",
        "what to do with a VMM that no audit could judge, as with an ordinary user's",
        choices=("kill", "warn"),
    ),
    "--kvm-clock": _Option(
        "off", "keep: the guest may use it, and one page stays exposed, which is told", choices=("off", "keep")
    ),
}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``wrap``."""
    parser = subparsers.add_parser(
        "wrap",
        help="run any VMM with its guest on hidden memory",
        description="Run a VMM as it is, and place memory that the host kernel has no mapping of under its guest. "
        "What cannot be hidden is refused.",
        epilog="Exit status: the VMM's; 2 if it was not started.",
    )
    for name, option in _OPTIONS.items():
        parser.add_argument(
            name, default=option.default, choices=option.choices, metavar=option.metavar, help=option.help
        )
    parser.add_argument(
        _TRUST_SHARED,
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
    values = {name: getattr(args, name[2:].replace("-", "_")) for name in _OPTIONS}
    return _become(
        argv, values, trust_shared=args.trust_shared, verbose=getattr(args, "verbose", False), as_json=as_json()
    )


def begin(words: "Sequence[str]") -> None:
    """Become the VMM, if no word before it needs argparse; else return (a short form, ``--help``, a mistake).

    Args:
        words: what follows ``offmap wrap``.

    Raises:
        OffmapError: it could not be started.
    """
    rest = list(words)
    values = {name: option.default for name, option in _OPTIONS.items()}
    trust_shared = False
    while rest and (word := rest.pop(0)) != "--":
        if word == _TRUST_SHARED:
            trust_shared = True
            continue
        name, written, value = word.partition("=")
        if name not in _OPTIONS or not (written or rest):
            return
        values[name] = value = value if written else rest.pop(0)
        choices = _OPTIONS[name].choices
        if value not in choices if choices else not value or value.startswith("-"):
            return
    if rest:
        _become(rest, values, trust_shared=trust_shared, verbose=False, as_json=False)


def _become(
    argv: "Sequence[str]", values: "Mapping[str, str]", *, trust_shared: bool, verbose: bool, as_json: bool
) -> int:
    from offmap.wrap.policy import Policy
    from offmap.wrap.start import run as start

    if not argv:
        raise OffmapError("no VMM to run", "write it after --: offmap wrap -- qemu-system-x86_64 …")
    policy = Policy(
        kill=values["--on-exposed"] == "kill",
        kill_undetermined=values["--on-undetermined"] == "kill",
        trust_shared=trust_shared,
        keep_clock=values["--kvm-clock"] == "keep",
    )
    start(argv, values["--memory"], policy, verbose=verbose, as_json=as_json)
