"""argparse's parsers of the commands."""

import argparse
import os
from collections.abc import Container, Sequence
from importlib import import_module
from typing import Any, NoReturn

from offmap import __version__
from offmap.cli.log import add_log_options
from offmap.cli.plain import WrongUse

_COMMANDS = {
    "run": "run a guest on RAM of the kind you choose",
    "audit": "say which pages of a VM the host kernel can reach",
    "attack": "follow the way from the host kernel to a secret in a guest",
    "doctor": "say which kinds of RAM this host can give, and which of them hide",
    "image": "make a file system for a guest",
    "wrap": "run any VMM with its guest on hidden memory",
    "module": "build and load the kernel module behind some kinds of RAM",
    "pool": "set hidden memory aside for VMMs that open it as files",
    "lab": "run a command in a disposable host",
    "demo": "boot guests on plain and on hidden RAM, and prove which is which",
    "compare": "compare the ways of hiding: what works, hides, breaks and costs",
    "completion": "print the completion of a shell",
}
"""What each command is for. It is a module of offmap.cli with an `add_parser`; only the one that is run is imported."""


# argparse looks for translations of its words, which takes a millisecond. Python ships none.
argparse._ = str  # type: ignore[attr-defined]


class _Help(argparse.HelpFormatter):
    """Help as wide as the terminal. argparse's own asks `shutil`, which takes as long to import as argparse."""

    def __init__(self, prog: str) -> None:
        try:
            width = int(os.environ.get("COLUMNS", "")) or os.get_terminal_size().columns
        except (OSError, ValueError):
            width = 80
        super().__init__(prog, width=width - 2)


class _Parser(argparse.ArgumentParser):
    def __init__(self, *, formatter_class: type[argparse.HelpFormatter] = _Help, **options: Any) -> None:  # argparse's
        super().__init__(formatter_class=formatter_class, **options)

    def error(self, message: str) -> NoReturn:
        raise WrongUse(self.prog, message)


def whole_parser() -> argparse.ArgumentParser:
    """The parser of all commands. The man page and the completion of shells are made from it."""
    return _parser(_COMMANDS)


class _Alone:
    """In the place of argparse's subparsers: makes the parser of one command, without the parsers above it."""

    parser: argparse.ArgumentParser

    def add_parser(self, name: str, **options: Any) -> argparse.ArgumentParser:  # argparse's
        self.parser = _Parser(prog=f"offmap {name}", **options)
        return self.parser


class _Together:
    """In the place of argparse's subparsers: gives each command its line in the list of commands."""

    def __init__(self, subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
        self._subparsers = subparsers

    def add_parser(self, name: str, **options: Any) -> argparse.ArgumentParser:  # argparse's
        return self._subparsers.add_parser(name, help=_COMMANDS[name], **options)


def parse(command: str | None, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Imports the command."""
    if command not in _COMMANDS or arguments[0] != command:
        return _parser((command or "",)).parse_args(arguments)
    alone = _Alone()
    import_module(f"offmap.cli.{command}").add_parser(alone)
    add_log_options(alone.parser)
    return alone.parser.parse_args(arguments[1:])


def _parser(commands: Container[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="offmap",
        description="KVM guests whose memory the host kernel does not map, and the proof of it.",
        epilog="Exit status: 0 done (an audit: hidden), 1 exposed, 2 failed or used wrongly, 3 cannot be determined.",
    )
    parser.add_argument("--version", action="version", version=f"offmap {__version__}")
    together = _Together(parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser))
    known = [name for name in _COMMANDS if name in commands]
    for name in known:
        import_module(f"offmap.cli.{name}").add_parser(together)
    for name in _COMMANDS if not known else ():
        together.add_parser(name)
    add_log_options(parser)
    return parser
