"""``offmap``: the command line. One module per command; this one only finds it and turns errors into one line."""

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NoReturn

from offmap import __version__
from offmap.errors import BackendRefused, ExitStatus, OffmapError

__all__ = ["main"]

_COMMANDS = {
    "run": "run a guest on RAM of the kind you choose",
    "audit": "say which pages of a VM the host kernel can reach",
    "doctor": "say which kinds of RAM this host can give, and which of them hide",
    "image": "make a file system for a guest",
    "module": "build and load the kernel module behind some kinds of RAM",
    "lab": "run a command in a disposable host",
    "demo": "boot guests on plain and on hidden RAM, and prove which is which",
    "compare": "compare the ways of hiding: what works, hides, breaks and costs",
}
"""Each is a module of offmap.cli with `add_parser`; only the one that was asked for is imported."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(ExitStatus.FAILED)


def _parser(command: str | None) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="offmap",
        description="KVM guests whose memory the host kernel cannot read, and the proof of it.",
        epilog="Exit status: 0 done (an audit: hidden), 1 exposed, 2 failed or used wrongly, 3 cannot be determined.",
    )
    parser.add_argument("--version", action="version", version=f"offmap {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for name, summary in _COMMANDS.items():
        if name == command:
            import_module(f"offmap.cli.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (default: the process's own) asks for.

    Returns:
        The exit status (offmap.errors.ExitStatus); for ``lab exec`` and ``run --exec`` that of the command.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["run"] and any(word.partition("=")[0] in {"--exec", "--exe", "--ex"} for word in arguments):
        return _of_another(arguments)
    return _main(arguments)


def _of_another(arguments: list[str]) -> int:
    """Run a command whose exit status is another's, and tell our own failures apart from it."""
    status: list[int] = []
    try:
        own = _main(arguments, status.append)
    except SystemExit as stop:
        own = stop.code if isinstance(stop.code, int) else ExitStatus.FAILED
    return status[0] if status else ExitStatus.NOT_RUN if own else own


def _main(arguments: list[str], on_status: Callable[[int], None] = lambda _: None) -> int:
    if any(stream is None for stream in (sys.stdin, sys.stdout, sys.stderr)):
        # The next file opened would become the missing stream, and the guest's console would write into it.
        if sys.stderr is not None:
            print("offmap: a standard stream is closed; redirect it from or to /dev/null instead", file=sys.stderr)
        return ExitStatus.FAILED
    command = next((word for word in arguments if not word.startswith("-")), None)
    try:
        args = _parser(command).parse_args(arguments)  # imports the command, which takes long enough for a Ctrl-C
        status: int = args.run(args)
        sys.stdout.flush()
        on_status(status)
    except OffmapError as error:
        # Scripts tell "this host cannot" from "it failed" by this word.
        refused = "refused: " if isinstance(error, BackendRefused) else ""
        print(f"offmap {command}: {refused}{error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print(f"offmap {command}: interrupted", file=sys.stderr)
        return ExitStatus.FAILED
    except BrokenPipeError:
        # Nobody reads our output any more. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitStatus.FAILED
    except Exception as error:
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            print(f"offmap {command}: cannot write the output: {error.strerror}; make room", file=sys.stderr)
            return ExitStatus.FAILED
        if isinstance(error, OSError) and error.errno in {errno.EMFILE, errno.ENFILE}:
            whose = "this process" if error.errno == errno.EMFILE else "this host"
            print(f"offmap {command}: {whose} may open no more files; raise its limit (ulimit -n)", file=sys.stderr)
            return ExitStatus.FAILED
        # A bug. Python's own status for it is 1, which would say "exposed".
        import traceback

        traceback.print_exc()
        return ExitStatus.FAILED
    return status


if __name__ == "__main__":
    sys.exit(main())
