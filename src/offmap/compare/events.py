"""The events of a program that measures in another host: lines of JSON, as they come."""

import json
from collections.abc import Callable
from typing import Any

from offmap.lab.errors import LabError

__all__ = ["EventLines", "Report"]

Report = Callable[[dict[str, Any]], None]


class EventLines:
    """Turns a stream of bytes into events, a line of JSON each.

    Args:
        event: takes each.
        who: says them, for the message about a line that is no event.
    """

    def __init__(self, event: Report, who: str = "the trial") -> None:
        self._event = event
        self._who = who
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Take the next bytes.

        Raises:
            LabError: a line that is no event.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                event = None
            if not isinstance(event, dict):
                raise LabError(f"{self._who} in the disposable host said {line[:80]!r}, which is no event")
            self._event(event)
