"""``-v`` and ``--log-format``: errors and progress on standard error, as lines for people or as JSON for services."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from offmap import log
from offmap.typed import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse


class LogOptions:
    """The values of the two options."""

    def __init__(self, *, verbose: bool = False, log_format: str = "text") -> None:
        self.verbose, self.log_format = verbose, log_format


_options = LogOptions()
"""The options of the command that this process runs."""


def draws() -> bool:
    """Whether standard error may show progress as one line that is rewritten. A log file wants no such line."""
    return not as_json() and sys.stderr.isatty()


def as_json() -> bool:
    """Whether standard error takes log records in JSON, and nothing else."""
    return _options.log_format == "json"


def quiet_in_a_file(logger: log.Logger) -> Callable[[str], None]:
    """A function that logs progress: on a terminal and as JSON always, into other files only with ``-v``."""
    return logger.info if sys.stderr.isatty() or as_json() else logger.debug


def add_log_options(parser: "argparse.ArgumentParser") -> None:
    """Add both options to `parser` and to the parsers of all its subcommands."""
    import argparse

    group = parser.add_argument_group("messages", "on standard error")
    # No defaults: the subcommand's default would replace an option that stands before the subcommand.
    none = argparse.SUPPRESS
    group.add_argument("-v", "--verbose", action="store_true", default=none, help="say what is done, step by step")
    formats = "text (the default), or json: one object a line, for services"
    group.add_argument("--log-format", choices=("text", "json"), default=none, help=formats)
    for action in parser._actions:  # argparse has no public way to its subparsers
        if isinstance(action, argparse._SubParsersAction):
            for subparser in set(action.choices.values()):
                add_log_options(subparser)


def split(arguments: Sequence[str]) -> tuple[str | None, LogOptions]:
    """The command and the two options, as far as they can be told before the command line is parsed."""
    options = LogOptions()
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if not any(word.startswith("-") and ("v" in word or "--l" in word) for word in own):
        return next((word for word in own if not word.startswith("-")), None), options  # no parser needed
    import argparse

    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    add_log_options(parser)
    try:
        _, rest = parser.parse_known_args(own, options)
    except argparse.ArgumentError:  # there is no such format; the real parser reports it
        rest = list(own)
    return next((word for word in rest if not word.startswith("-")), None), options


@contextmanager
def logging_to_stderr(program: str, options: LogOptions) -> Iterator[None]:
    """Send log records to standard error.

    Args:
        program: the beginning of lines that the library logs and not the command, like ``offmap run``.
        options: read when the first record comes; the format is read again for each record.
    """
    global _options  # noqa: PLW0603 - the process's, as standard error is
    before, _options = _options, options
    undo: list[Callable[[], None]] = []

    def set_up() -> None:
        from offmap.cli.log_lines import handle

        undo.append(handle(program, options.verbose, as_json))

    if options.log_format == "json":
        set_up()  # so that the records of other libraries are JSON too
    else:
        log.set_up_with(set_up, log.DEBUG if options.verbose else log.INFO)
    try:
        yield
    finally:
        log.set_up_with(None)
        for each in undo:
            each()
        _options = before
