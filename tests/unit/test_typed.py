"""Named tuples without `typing`: they behave as typing's do."""

import pickle
import typing
from collections.abc import Callable

from offmap import typed


class Point(typed.NamedTuple):
    """A point."""

    x: int
    y: int = 2

    @property
    def total(self) -> int:
        return self.x + self.y

    @classmethod
    def origin(cls) -> "Point":
        return cls(0, 0)


class TypingsPoint(typing.NamedTuple):
    """A point."""

    x: int
    y: int = 2


class Shape(typed.Protocol):
    sides: typed.ClassVar[int]

    def area(self, of: Callable[[typed.Any], typed.Self | None]) -> int: ...


def test_a_named_tuple_is_what_typing_makes() -> None:
    assert tuple(Point(1)) == tuple(TypingsPoint(1)) == (1, 2)
    assert repr(Point(y=1, x=0)) == "Point(x=0, y=1)"
    assert Point._fields == TypingsPoint._fields
    assert Point._field_defaults == TypingsPoint._field_defaults
    assert Point.__annotations__ == TypingsPoint.__annotations__
    assert Point.__doc__ == "A point."
    assert Point.__module__ == __name__


def test_it_keeps_its_methods_and_its_place() -> None:
    assert Point(3).total == 5
    assert Point.origin() == (0, 0)
    assert isinstance(Point.origin()._replace(x=1), Point)
    assert pickle.loads(pickle.dumps(Point(4))) == Point(4)


def test_other_names_may_stand_in_annotations_and_among_bases() -> None:
    class Square(Shape):
        sides = 4

        def area(self, of: Callable[[typed.Any], typed.Self | None]) -> int:
            return 0

    assert Square().sides == 4
