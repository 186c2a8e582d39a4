"""The text of trace_pipe as events.

A process chooses its own name, line breaks included, and the name stands at the beginning of its line. So a line with
the marks of an event is one, whatever stands before them. Any line that is not understood is counted, and makes the
time undetermined.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

# <comm>-<tid> (<tgid>) [<cpu>] <flags> <seconds>: <event>: …
_EVENT = re.compile(
    r"-(?P<tid>\d+)\s+\(\s*(?P<tgid>\d+|-+)\) \[\d+\] \S+\s+(?P<time>\d+\.\d{6}): "
    r"(?P<name>\w+|<stack trace>)(?::(?P<rest>.*))?$"
)
_STACK = re.compile(r"^ => (?P<name>\S.*)$")
_LOST = re.compile(r"^CPU:\d+ \[LOST (?P<count>\d+) EVENTS\]$")
_ARGUMENT = re.compile(r"(?P<name>\w+)=(?P<value>\{[^}]*\}|\S+)")
_MOST_FRAMES = 24  # of a stack that are kept


@dataclass
class Event:
    """One call of a probed function.

    Attributes:
        name: of the event.
        time_us: on the monotonic clock, in microseconds.
        task: the thread's own name, as it chose it.
        tid, tgid: the thread and its process; tgid is 0 where the kernel did not know it.
        arguments: by name.
        stack: the functions that led there, the innermost first.
    """

    name: str
    time_us: int
    task: str
    tid: int
    tgid: int
    arguments: dict[str, str]
    stack: list[str] = field(default_factory=list)

    def number(self, name: str) -> int | None:
        """An argument as a number; None if it was not recorded."""
        try:
            return int(self.arguments[name], 0)
        except (KeyError, ValueError):
            return None

    def numbers(self, name: str) -> list[int | None]:
        """An argument that is an array; a member that could not be read is None."""
        found: list[int | None] = []
        for word in self.arguments.get(name, "").strip("{}").split(","):
            try:
                found.append(int(word, 0))
            except ValueError:
                found.append(None)
        return found


class EventReader:
    """Makes events of text that comes in pieces.

    Attributes:
        lost: events that the kernel says it lost.
        strange: lines that were not understood.
    """

    def __init__(self) -> None:
        self.lost = 0
        self.strange = 0
        self._rest = ""
        self._last: dict[int, Event] = {}
        self._stack_of: Event | None = None
        self._waiting: list[Event] = []

    def feed(self, text: str) -> list[Event]:
        """The events that are whole. The last one waits for its stack, but not if nothing came since."""
        lines = (self._rest + text).split("\n")
        self._rest = lines.pop()
        self._waiting += self._events(lines)
        whole = not text or not self._waiting or bool(self._waiting[-1].stack)
        kept = [] if whole else self._waiting[-1:]
        done = self._waiting if whole else self._waiting[:-1]
        self._waiting = kept
        return done

    def flush(self) -> list[Event]:
        """The last event: nothing follows."""
        done, self._waiting = self._waiting, []
        return done

    def _events(self, lines: list[str]) -> Iterator[Event]:
        for line in lines:
            if found := _EVENT.search(line):
                tid = int(found["tid"])
                if found["name"] == "<stack trace>":
                    self._stack_of = self._last.get(tid)
                    continue
                seconds, microseconds = found["time"].split(".")
                event = Event(
                    name=found["name"],
                    time_us=int(seconds) * 1_000_000 + int(microseconds),
                    task=line[: found.start()].strip(),
                    tid=tid,
                    tgid=int(found["tgid"]) if found["tgid"].isdigit() else 0,
                    arguments={each["name"]: each["value"] for each in _ARGUMENT.finditer(found["rest"] or "")},
                )
                self._last = {**self._last, tid: event} if len(self._last) < 4096 else {tid: event}
                self._stack_of = None
                yield event
            elif (called := _STACK.match(line)) and self._stack_of is not None:
                if len(self._stack_of.stack) < _MOST_FRAMES:
                    self._stack_of.stack.append(called["name"])
            elif gone := _LOST.match(line):
                self.lost += int(gone["count"])
            elif line.strip() and not line.startswith("#"):
                self.strange += 1
