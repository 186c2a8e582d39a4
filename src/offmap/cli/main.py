"""``offmap``: the command line. One module per command; this one finds it, and turns errors into one line."""

import argparse
import errno
import gc
import os
import sys
from collections.abc import Callable, Container, Sequence
from importlib import import_module
from typing import Any, NoReturn

from offmap import __version__
from offmap.cli.log import LogOptions, add_log_options, logging_to_stderr, split
from offmap.errors import BackendRefused, ExitStatus, OffmapError
from offmap.log import ERROR, Logger

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
"""Each command is a module of offmap.cli with an `add_parser`. Only the one that is run is imported."""


class _WrongUse(OffmapError):
    """A command line that its parser refuses.

    Attributes:
        program: the words of the command, like ``offmap lab exec``.
    """

    def __init__(self, program: str, message: str) -> None:
        self.program = program
        super().__init__(message, f"see {program} --help")


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
        raise _WrongUse(self.prog, message)


def whole_parser() -> argparse.ArgumentParser:
    """The parser of all commands. The man page and the completion of shells are made from it."""
    return _parser(_COMMANDS)


class _Alone:
    """In the place of argparse's subparsers: makes the parser of one command, without the parsers above it."""

    parser: argparse.ArgumentParser

    def add_parser(self, name: str, *, help: str = "", **options: Any) -> argparse.ArgumentParser:  # argparse's
        self.parser = _Parser(prog=f"offmap {name}", **options)
        return self.parser


def _parse(command: str | None, arguments: Sequence[str]) -> argparse.Namespace:
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
        description="KVM guests whose memory the host kernel cannot read, and the proof of it.",
        epilog="Exit status: 0 done (an audit: hidden), 1 exposed, 2 failed or used wrongly, 3 cannot be determined.",
    )
    parser.add_argument("--version", action="version", version=f"offmap {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    known = [name for name in _COMMANDS if name in commands]
    for name in known:
        import_module(f"offmap.cli.{name}").add_parser(subparsers)
    for name, summary in _COMMANDS.items() if not known else ():
        subparsers.add_parser(name, help=summary)
    add_log_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (default: the process's own) asks for.

    Returns:
        The exit status (offmap.errors.ExitStatus); for ``lab exec`` and ``run --exec`` that of the command.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command, options = split(arguments)
    if command == "run" and any(word.partition("=")[0] in {"--exec", "--exe", "--ex"} for word in arguments):
        return _of_another(command, options, arguments)
    return _main(command, options, arguments)


def _of_another(command: str, options: LogOptions, arguments: list[str]) -> int:
    """Run a command that ends with the status of a program. If offmap itself fails, the status is NOT_RUN."""
    status: list[int] = []
    try:
        own = _main(command, options, arguments, status.append)
    except SystemExit as stop:
        own = stop.code if isinstance(stop.code, int) else ExitStatus.FAILED
    return status[0] if status else ExitStatus.NOT_RUN if own else own


def _main(
    command: str | None,
    options: LogOptions,
    arguments: list[str],
    on_status: Callable[[int], None] = lambda _: None,
) -> int:
    program = f"offmap {command}" if command else "offmap"
    with logging_to_stderr(program, options):
        if any(stream is None for stream in (sys.stdin, sys.stdout, sys.stderr)):
            # The next file that is opened would become the missing stream. The guest's console would go into it.
            if sys.stderr is not None:
                error = OffmapError("a standard stream is closed", "redirect it from or to /dev/null instead")
                _log_error("offmap", str(error), error)
            return ExitStatus.FAILED
        try:
            gc.disable()  # there is no garbage yet, and looking for some takes a twentieth of the start
            try:
                args = _parse(command, arguments)  # takes long enough for a Ctrl-C
            finally:
                gc.freeze()
                gc.enable()
            options.verbose, options.log_format = getattr(args, "verbose", False), getattr(args, "log_format", "text")
            status: int = args.run(args)
            sys.stdout.flush()
            on_status(status)
            return status
        except BrokenPipeError:
            # The reader of our output has gone. Python would complain again when it flushes at exit.
            _forget_output()
            return ExitStatus.FAILED
        except (Exception, KeyboardInterrupt) as caught:
            return _say(program, caught)


def report(command: str, error: BaseException) -> int:
    """Say why a command failed that was run without `main`. Returns its exit status."""
    program = f"offmap {command}"
    with logging_to_stderr(program, LogOptions()):
        return _say(program, error)


def _say(program: str, error: BaseException) -> ExitStatus:
    failure = _failure(error)
    if failure is None:
        # Python would end with 1, which means "exposed".
        _log_error(program, "this is a bug in offmap", error)
        return ExitStatus.FAILED
    # By this word scripts tell "this host cannot" from "it failed".
    refused = "refused: " if isinstance(failure, BackendRefused) else ""
    name = failure.program if isinstance(failure, _WrongUse) else program
    _log_error(name, f"{refused}{failure}", failure)
    return failure.exit_status


def _failure(error: BaseException) -> OffmapError | None:
    """The failure that a user is told of; None if the exception is a bug."""
    if isinstance(error, OffmapError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return OffmapError("interrupted")
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        _forget_output()
        return OffmapError(f"cannot write the output: {error.strerror}", "make room")
    if isinstance(error, OSError) and error.errno in {errno.EMFILE, errno.ENFILE}:
        whose = "this process" if error.errno == errno.EMFILE else "this host"
        return OffmapError(f"{whose} may open no more files", "raise its limit (ulimit -n)")
    return None


def _log_error(program: str, message: str, error: BaseException) -> None:
    logger = Logger(program.replace("offmap", "offmap.cli", 1).replace(" ", "."))
    try:
        logger.log(ERROR, "%s", message, error=error)
    except OSError:  # `logging` cannot be imported, as no more files can be opened
        print(f"{program}: {message}", file=sys.stderr)


def _forget_output() -> None:
    """Send standard output to /dev/null, so that Python's flush at exit cannot fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
