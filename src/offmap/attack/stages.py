"""The steps of a chain: each is named, its reads are counted, and what goes wrong in one ends the chain."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from offmap.attack.linux import Lost
from offmap.attack.primitive import Counts, NotMapped, Primitive, Unreadable
from offmap.attack.result import Outcome, Stage
from offmap.attack.vm import Hidden, NotThere, Reached
from offmap.audit.btf import Unknown


class Ended(Exception):
    """The chain is over."""

    def __init__(self, outcome: Outcome, stage: str, reason: str) -> None:
        self.outcome, self.stage, self.reason = outcome, stage, reason
        super().__init__(reason)


class Report:
    """What a stage says that it found."""

    def __init__(self) -> None:
        self.found = ""


class Stages:
    """All steps that were made, in order.

    Args:
        primitive: whose reads are counted.
    """

    def __init__(self, primitive: Primitive) -> None:
        self._primitive = primitive
        self.made: list[Stage] = []

    @property
    def last(self) -> str:
        """Name of the last one."""
        return self.made[-1].name

    @contextmanager
    def step(self, name: str) -> Iterator[Report]:
        """One step. What goes wrong in it ends the chain; but ``Hidden`` is handed on. Raises Ended: it went wrong."""
        before, began, report = self._primitive.counts.copy(), time.monotonic(), Report()
        try:
            yield report
        except BaseException as error:
            self._note(name, False, str(error), before, began)
            if isinstance(error, Reached):
                raise Ended(Outcome.REACHED, name, str(error)) from None
            if isinstance(error, NotMapped):
                reason = f"{error}, and it should be: the trail is lost"
                raise Ended(Outcome.UNKNOWN, name, reason) from None
            if isinstance(error, (Unreadable, Lost, Unknown, NotThere)):
                raise Ended(Outcome.UNKNOWN, name, str(error)) from None
            raise
        self._note(name, True, report.found, before, began)

    @contextmanager
    def step_to_the_end(self, name: str) -> Iterator[Report]:
        """The same; but ``Hidden`` too loses the trail: what was mapped is mapped no more."""
        with self.step(name) as report:
            try:
                yield report
            except Hidden as error:
                raise Lost(f"{error} any more: the host changed meanwhile") from None

    def _note(self, name: str, passed: bool, found: str, before: Counts, began: float) -> None:
        used = self._primitive.counts.since(before)
        self.made.append(
            Stage(
                name=name,
                passed=passed,
                found=found,
                reads=used.reads,
                bytes=used.bytes,
                failures=used.failures,
                seconds=round(time.monotonic() - began, 3),
            )
        )
