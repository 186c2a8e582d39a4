"""JSON into frozen dataclasses, strictly: what a renderer is given has the types that it says.

A report may come from another host (``--merge``), and names in it from the audited processes. So nothing is taken on
trust: a wrong type, a missing field or a number that cannot be is an error that says where, and text loses what could
move a terminal's cursor or turn a line of writing around.
"""

import dataclasses
import math
import re
import types
import typing
from enum import Enum
from functools import cache
from typing import Any, NewType, TypeVar, cast

__all__ = ["Address", "Malformed", "decode", "plain"]

T = TypeVar("T")

Address = NewType("Address", int)
"""In JSON a string, ``"0xffff888000000000"``: JavaScript's numbers hold 53 bits."""

_ADDRESS = re.compile(r"0x[0-9a-f]{1,16}")


class Malformed(ValueError):
    """The JSON is not what it says it is; the text says where and why."""


def plain(text: str) -> str:
    """`text` with everything invisible written out.

    Control characters, line breaks, characters that turn the direction of writing and halves of surrogate pairs
    become escapes like ``\\x1b``, so that a name cannot pass for something else on a terminal or on a page.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def decode(kind: type[T], value: Any, where: str = "") -> T:
    """Make a `kind` of decoded JSON.

    Args:
        kind: a dataclass whose fields are of: dataclasses, enums, str, int (of 64 bits, not negative), float, bool,
            Address, ``tuple[X, ...]``, ``tuple[X, Y]``, ``dict[str, X]`` and ``X | None``. A field with a default may
            be missing. Fields that the class does not have are passed over: they are a later version's.
        value: what json.loads gave.
        where: path of the value in the file, for messages.

    Raises:
        Malformed: it is not one.
    """
    return cast(T, _decode(kind, value, where))


@cache
def _fields(kind: Any) -> list[tuple[str, Any, bool]]:
    hints = typing.get_type_hints(kind)
    return [
        (
            each.name,
            hints[each.name],
            each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING,
        )
        for each in dataclasses.fields(kind)
    ]


def _decode(kind: Any, value: Any, where: str) -> Any:
    if kind in _SCALARS:
        return _SCALARS[kind](value, where)
    if dataclasses.is_dataclass(kind):
        return _record(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in {types.UnionType, typing.Union}:
        return None if value is None else _decode(arguments[0], value, where)
    if origin is tuple:
        return _array(arguments, value, where)
    if origin is dict:
        _must(isinstance(value, dict), where, "is no object")
        return {plain(key): _decode(arguments[1], item, f"{where}.{plain(key)}") for key, item in value.items()}
    if isinstance(kind, type) and issubclass(kind, Enum):
        known = {member.value: member for member in kind}
        _must(isinstance(value, str | int) and value in known, where, f"is none of {', '.join(map(str, known))}")
        return known[value]
    raise TypeError(f"{kind} cannot be decoded")


def _record(kind: Any, value: Any, where: str) -> Any:
    _must(isinstance(value, dict), where, "is no object")
    found = {}
    for name, hint, required in _fields(kind):
        path = f"{where}.{name}" if where else name
        if name in value:
            found[name] = _decode(hint, value[name], path)
        else:
            _must(not required, path, "is missing")
    return kind(**found)


def _array(kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    _must(isinstance(value, list), where, "is no array")
    if kinds[-1] is Ellipsis:
        return tuple(_decode(kinds[0], item, f"{where}[{at}]") for at, item in enumerate(value))
    _must(len(value) == len(kinds), where, f"has not {len(kinds)} items")
    return tuple(
        _decode(kind, item, f"{where}[{at}]") for at, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _must(condition: bool, where: str, what: str) -> None:
    if not condition:
        raise Malformed(f"{where or 'the whole'} {what}")


def _str(value: Any, where: str) -> str:
    _must(isinstance(value, str), where, "is no string")
    return plain(value)


def _int(value: Any, where: str) -> int:
    _must(type(value) is int and 0 <= value < 1 << 64, where, "is no whole number of 64 bits")
    return cast(int, value)


def _float(value: Any, where: str) -> float:
    _must(type(value) in {int, float} and 0 <= value < 1 << 64 and math.isfinite(value), where, "is no number")
    return float(value)


def _bool(value: Any, where: str) -> bool:
    _must(isinstance(value, bool), where, "is neither true nor false")
    return cast(bool, value)


def _address(value: Any, where: str) -> int:
    _must(isinstance(value, str) and _ADDRESS.fullmatch(value) is not None, where, "is no address")
    return int(value, 16)


_SCALARS = {str: _str, int: _int, float: _float, bool: _bool, Address: _address}
