"""Walks over a stretch of time: at random moments, until the time is over or nothing more can be found."""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from offmap.audit.mappings import KernelMappings
from offmap.audit.result import Coverage, Look
from offmap.audit.walk import Walker

SECONDS = 1.0
"""How long, unless somebody says otherwise."""

_A_SECOND = 20
"""Walks for each second. A page that is mapped all the time is missed by a walk once in e times, so by twenty once in
500 million audits; and one that is mapped half of the time once in 22,000."""

_random = random.SystemRandom()


@dataclass(frozen=True)
class Walked:
    """What they found together, and what each was.

    Attributes:
        mappings: the union.
        looks: one for each walk.
        seconds: from the first one's begin to the last one's end.
    """

    mappings: KernelMappings
    looks: tuple[Look, ...]
    seconds: float

    def coverage(self) -> Coverage:
        return Coverage(round(self.seconds, 3), self.mappings.passes, self.mappings.roots, self.looks)


def _moments(count: int, seconds: float) -> Iterator[float]:
    """0, then the others, each equally likely anywhere in ``seconds``, in ascending order; one after the other, as
    there may be millions.
    """
    moment = 0.0
    yield moment
    for left in range(count - 1, 0, -1):
        # The least of so many that are equally likely anywhere in what is left.
        moment += (seconds - moment) * (1 - _random.random() ** (1 / left))
        yield moment


def walk_for(
    walker: Walker, seconds: float, enough: Callable[[KernelMappings], bool], progress: Callable[[float], None]
) -> Walked:
    """Walk now, and again at random moments of the next ``seconds``.

    Args:
        seconds: 0 for one walk.
        enough: whether what was found so far leaves nothing to be found out; asked when there is something new.
        progress: told the share that is done.

    Raises:
        Undetermined: the page tables cannot be read.
    """
    started = time.monotonic()
    count = max(round(_A_SECOND * seconds), _A_SECOND) if seconds else 1
    looks = []
    for number, moment in enumerate(_moments(count, seconds)):
        time.sleep(max(started + moment - time.monotonic(), 0))
        at, whole = time.monotonic() - started, walker.passes
        new = walker.walk()
        looks.append(Look(round(at, 3), round(time.monotonic() - started - at, 4), walker.passes > whole, new))
        if new and enough(walker.mappings()):
            break
        progress((number + 1) / count)
    return Walked(walker.mappings(), tuple(looks), time.monotonic() - started)
