"""Log records as lines on standard error. Imported with the first record, as importing ``logging`` takes long."""

import json
import logging
import sys
import traceback
from collections.abc import Callable

from offmap.errors import OffmapError
from offmap.log import json_fields


def handle(program: str, verbose: bool, as_json: Callable[[], bool]) -> Callable[[], None]:
    """Handle the records of this process from now on.

    Args:
        program: see ``logging_to_stderr``.
        as_json: asked for each record.

    Returns:
        A function that stops handling them.
    """
    handler = _Stderr(program, as_json)
    root, ours = logging.getLogger(), logging.getLogger("offmap")
    level = ours.level
    root.addHandler(handler)
    ours.setLevel(logging.DEBUG if verbose else logging.INFO)  # of other libraries: WARNING
    logging.captureWarnings(True)

    def end() -> None:
        logging.captureWarnings(False)
        ours.setLevel(level)
        root.removeHandler(handler)

    return end


class _Stderr(logging.Handler):
    """Writes to the ``sys.stderr`` of the moment, which may change."""

    def __init__(self, program: str, as_json: Callable[[], bool]) -> None:
        super().__init__()
        self._program = program
        self._as_json = as_json

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = _json(record) if self._as_json() else _text(record, self._program)
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()
        except OSError:
            pass  # its reader has gone, or its disk is full; the work goes on


def _text(record: logging.LogRecord, program: str) -> str:
    """``offmap run: message``; a record of level DEBUG names its logger too."""
    message = record.getMessage()
    start, command, words = record.name.partition("offmap.cli")
    if command and not start:
        # The logger is named after the command: offmap.cli.image.build is "offmap image build".
        line = f"offmap{words.replace('.', ' ')}: {message}"
    elif record.levelno <= logging.DEBUG:
        line = f"{program}: {record.name}: {message}"
    else:
        line = f"{program}: {message}"
    return "\n".join([line, *_traceback(record)])


def _json(record: logging.LogRecord) -> str:
    """One object: time (UTC), level, logger, message. An error adds what, why, remedy and exit_status."""
    fields = json_fields(record.created, record.levelname.lower(), record.name, record.getMessage())
    error = getattr(record, "error", None)
    if isinstance(error, OffmapError):
        fields |= {"error": type(error).__name__, "what": error.what, "why": error.why, "remedy": error.remedy}
        fields["exit_status"] = int(error.exit_status)
    if stack := _traceback(record):
        fields["traceback"] = "\n".join(stack)
    return json.dumps(fields)


def _traceback(record: logging.LogRecord) -> list[str]:
    """The lines of a bug's traceback. A failure that a user can meet has none."""
    error = getattr(record, "error", None) or (record.exc_info and record.exc_info[1])
    if not isinstance(error, BaseException) or isinstance(error, OffmapError):
        return []
    return "".join(traceback.format_exception(error)).splitlines()
