"""``offmap completion``: the completion of a shell, which shtab makes from the parsers of all commands."""

import argparse
from pathlib import Path

from offmap.errors import ExitStatus

_FILES = {"FILE", "DIR", "FOLDER"}
"""The metavars of file names that a parser takes as text."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``completion``."""
    parser = subparsers.add_parser(
        "completion",
        description="Print a script that completes offmap's commands, options and their values.",
        epilog="Where to put it, for one user: bash: ~/.local/share/bash-completion/completions/offmap; zsh: a file "
        "_offmap in a folder of $fpath; fish: ~/.config/fish/completions/offmap.fish.",
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish", "tcsh"), metavar="SHELL", help="bash, zsh, fish, tcsh")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    import shtab

    from offmap.cli.parsers import whole_parser

    parser = whole_parser()
    _name_values(parser)
    print(shtab.complete(parser, args.shell))
    return ExitStatus.DONE


def _name_values(parser: argparse.ArgumentParser) -> None:
    """Give options the values to complete: backends and file names. The parser takes other values too."""
    import shtab

    from offmap.cli.boot_options import file_name
    from offmap.memory.backend import BACKENDS

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in set(action.choices.values()):
                _name_values(subparser)
        elif str(action.metavar).startswith(("BACKEND", "RAM")):
            action.choices = tuple(BACKENDS)
        elif action.metavar in _FILES or action.type in {Path, file_name}:
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # how shtab is told
