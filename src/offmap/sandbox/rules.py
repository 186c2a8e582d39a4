"""Rules: a system call by its name, and what its arguments must be. All else is a violation."""

from collections.abc import Iterable, Mapping

from offmap.typed import NamedTuple


class Argument(NamedTuple):
    """A condition on the lower 32 bits of one argument.

    Attributes:
        number: of the argument, from 0.
        values: one of which it must be; None: any.
        without: bits that must not be set.
        with_: bits of which one at least must be set.
    """

    number: int
    values: frozenset[int] | None = None
    without: int = 0
    with_: int = 0


Rule = tuple[str, tuple[Argument, ...]]
"""A system call, and what must be true of its arguments. Several rules of one call: one of them must hold."""


def allow(*names: str) -> list[Rule]:
    """These system calls, whatever their arguments."""
    return [(name, ()) for name in names]


def one_of(name: str, number: int, values: Iterable[int]) -> Rule:
    """`name` with argument `number` being one of `values`."""
    return name, (Argument(number, frozenset(value & 0xFFFFFFFF for value in values)),)


def without(name: str, number: int, bits: int) -> Rule:
    """`name` with none of `bits` in argument `number`."""
    return name, (Argument(number, without=bits),)


def with_bit(name: str, number: int, bits: int) -> Rule:
    """`name` with one of `bits` in argument `number`."""
    return name, (Argument(number, with_=bits),)


def both(one: Rule, other: Rule) -> Rule:
    """What two rules of one call allow both."""
    return one[0], one[1] + other[1]


def by_call(rules: Iterable[Rule]) -> Mapping[str, list[tuple[Argument, ...]]]:
    """The conditions of each call, those together of which one must hold; none at all where any arguments do."""
    calls: dict[str, list[tuple[Argument, ...]]] = {}
    for name, arguments in rules:
        known = calls.setdefault(name, [])
        if not arguments:
            known[:] = [()]
        elif known != [()] and arguments not in known:
            known.append(arguments)
    return calls
