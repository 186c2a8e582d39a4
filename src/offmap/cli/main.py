"""``offmap``: the command line. One module per command; this one runs it, and turns errors into one line."""

import errno
import gc
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from offmap.cli.log import LogOptions, logging_to_stderr, split
from offmap.cli.plain import PlainParser, WrongUse
from offmap.errors import BackendRefused, ExitStatus, OffmapError
from offmap.log import ERROR, Logger
from offmap.typed import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

_PLAIN = ("run",)
"""The commands that a guest waits for. Most of their command lines need no argparse."""


def _parse(command: str | None, arguments: Sequence[str]) -> "argparse.Namespace":
    """Parse the command line. Imports the command."""
    if command in _PLAIN and arguments[0] == command:
        plain = PlainParser()
        import_module(f"offmap.cli.{command}").add_parser(plain)
        values = plain.parse(arguments[1:])
        if values is not None:
            return values
    from offmap.cli.parsers import parse

    return parse(command, arguments)


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
    name = failure.program if isinstance(failure, WrongUse) else program
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
