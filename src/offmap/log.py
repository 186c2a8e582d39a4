"""Loggers under ``offmap``. They import ``logging`` only if a record can be heard.

Importing ``logging`` would take a tenth of the start of ``offmap run``. Until it is imported nobody has asked for
records, so those below WARNING are dropped, as ``logging`` itself would drop them.
"""

import _thread  # `threading` takes as long to import as all else here
import sys
from _collections_abc import Callable  # os has it already; collections.abc would bring more

DEBUG, INFO, WARNING, ERROR = 10, 20, 30, 40  # as `logging` has them

_lock = _thread.RLock()  # a signal's handler may log inside `log`
_level = WARNING
_set_up: Callable[[], None] | None = None
Sink = Callable[[int, str, str], None]
_sink: Sink | None = None


class Logger:
    """A logger by its name, like ``offmap.lab.qemu``. Messages and their arguments are those of ``logging``."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def debug(self, message: str, *args: object) -> None:
        """Log what helps to find a fault."""
        self.log(DEBUG, message, *args)

    def info(self, message: str, *args: object) -> None:
        """Log what somebody who waits wants to know."""
        self.log(INFO, message, *args)

    def warning(self, message: str, *args: object) -> None:
        """Log what was left out, or may come out wrong."""
        self.log(WARNING, message, *args)

    def log(self, level: int, message: str, *args: object, error: BaseException | None = None) -> None:
        """Log it, with `error` as the record's attribute of that name."""
        global _set_up  # noqa: PLW0603 - the process's, as all of `logging` is
        if not is_taken(level):
            return
        if _sink is not None:
            _sink(level, self.name, message % args + ("" if error is None else described(error)))
            return
        import logging

        with _lock:
            if _set_up is not None:
                _set_up()
                _set_up = None
        logging.getLogger(self.name).log(level, message, *args, stacklevel=3, extra={"error": error})


def is_taken(level: int) -> bool:
    """Whether a record of this level goes anywhere; else what it would say need not be found out."""
    return level >= _level or "logging" in sys.modules


def described(error: BaseException) -> str:
    """Where a bug is, without opening the source files that Python's own traceback shows lines of; else nothing."""
    if hasattr(error, "exit_status"):  # an OffmapError, which says all in its line
        return ""
    lines = [f": {type(error).__name__}: {error}"]
    frame = error.__traceback__
    while frame is not None:
        lines.append(f"  {frame.tb_frame.f_code.co_filename}:{frame.tb_lineno} in {frame.tb_frame.f_code.co_name}")
        frame = frame.tb_next
    return "\n".join(lines)


def json_fields(seconds: float, level: str, logger: str, message: str) -> dict[str, object]:
    """The fields that every record has as JSON; `seconds` since the epoch become time in UTC, to the millisecond."""
    import time

    clock = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1000):03}Z"
    return {"time": clock, "level": level, "logger": logger, "message": message}


def set_up_with(set_up: Callable[[], None] | None, level: int = WARNING) -> None:
    """Have `logging` set up by `set_up`, once, before the first record of `level` or more. None: by nobody."""
    global _level, _set_up
    _level, _set_up = level, set_up


def forward_to(sink: Sink | None) -> None:
    """Have records taken by `sink` (level, logger's name, message), which logs them elsewhere. None: log them here."""
    global _sink  # noqa: PLW0603 - as above
    _sink = sink
