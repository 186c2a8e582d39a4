"""Results as types: one ``msgspec.Struct`` gives the JSON, its JSON Schema and the strict decoding of files.

A file may come from another host, and names in it from the audited processes. So nothing is trusted: a wrong type, a
missing field, a name given twice or an impossible number is an error that says where. Text loses what could move a
terminal's cursor or reverse the direction of writing.
"""

import inspect
import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

T = TypeVar("T")

Count = Annotated[int, Meta(ge=0)]
"""A whole number of 64 bits, not negative."""

Seconds = Annotated[float, Meta(ge=0, le=2.0**64)]

_ADDRESS = re.compile(r"0x[0-9a-f]{1,16}")


class Address(int):
    """In JSON a string, ``"0xffff888000000000"``: JavaScript's numbers hold 53 bits."""


class Document(msgspec.Struct, frozen=True):
    """A part of a result. Its class docstring describes each field under ``Attributes:``; the JSON Schema quotes it."""

    def to_json(self) -> dict[str, object]:
        """For ``json.dumps``, which escapes whatever is not ASCII."""
        found: dict[str, object] = msgspec.to_builtins(self, enc_hook=_to_builtin)
        return found


class Malformed(ValueError):
    """The JSON is not what it claims to be; the text says where and why."""


def one_of(values: Iterable[str | int]) -> Meta:
    """For the schema only: the values that this version writes. Readers take a later version's values too."""
    return Meta(extra_json_schema={"enum": list(values)})


def plain(text: str) -> str:
    """`text` with everything invisible written out.

    Control characters, line breaks, characters that change the direction of writing and halves of surrogate pairs
    become escapes like ``\\x1b``, so that a name cannot pass for something else on a terminal or on a page.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def parse_json(text: bytes) -> object:
    """What this JSON says. Raises Malformed: it is no JSON, nested too deeply, or one object has a name twice."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except Malformed:
        raise
    except (ValueError, RecursionError) as error:
        what = str(error).splitlines()[0] if isinstance(error, ValueError) else "nested too deeply"
        raise Malformed(f"is not JSON: {what}") from None


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise Malformed(f"has {plain(twice)[:80]!r} twice in one object")
    return found


def decode(kind: type[T], value: object) -> T:
    """Make a `kind` of decoded JSON, with all text made ``plain``.

    Fields that the type does not have are ignored: they are a later version's.

    Raises:
        Malformed: it is not one.
    """
    try:
        return msgspec.convert(_checked(value, ""), kind, dec_hook=_from_builtin)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$")
        where = path.rstrip("`").lstrip(".") or "the whole"
        raise Malformed(f"{where}: {what.replace('`', ''):.200}") from None
    except RecursionError:
        raise Malformed("the whole: nested too deeply") from None


def _checked(value: object, where: str) -> object:
    """`value` with plain text and possible numbers only: what msgspec does not check."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, dict):
        return {plain(key): _checked(item, f"{where}.{plain(key)}") for key, item in value.items()}
    if isinstance(value, list):
        return [_checked(item, f"{where}[{at}]") for at, item in enumerate(value)]
    if isinstance(value, int) and value >= 1 << 64:
        raise Malformed(f"{where.lstrip('.') or 'the whole'}: is no whole number of 64 bits")
    if isinstance(value, float) and not math.isfinite(value):
        raise Malformed(f"{where.lstrip('.') or 'the whole'}: is no finite number")
    return value


def _from_builtin(kind: type, value: object) -> object:
    if kind is Address:
        if not isinstance(value, str) or _ADDRESS.fullmatch(value) is None:
            raise ValueError("is no address")
        return Address(value, 16)
    raise TypeError(f"{kind} cannot be decoded")


def _to_builtin(value: object) -> str:
    if isinstance(value, Address):
        return f"{value:#x}"
    raise TypeError(f"{type(value)} cannot be encoded")


def json_schema(kinds: Iterable[type[Document]], name: str, description: str) -> dict[str, object]:
    """The JSON Schema (draft 2020-12) of a document that is one of these kinds, a discriminated union."""
    parts, defined = msgspec.json.schema_components(list(kinds), schema_hook=_schema_of)
    for kind in _all_structs(Document):
        if kind.__name__ in defined:
            about, fields = _described(kind)
            defined[kind.__name__]["description"] = about
            for field, node in defined[kind.__name__]["properties"].items():
                if field in fields:
                    node["description"] = fields[field]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:offmap:{name}",
        "title": f"offmap {name}",
        "description": description,
        "oneOf": list(parts),
        "$defs": defined,
    }


def _schema_of(kind: type) -> dict[str, str]:
    if kind is Address:
        return {"type": "string", "pattern": "^0x[0-9a-f]{1,16}$"}
    raise TypeError(f"{kind} has no schema")


def _all_structs(kind: type[Document]) -> Iterator[type[Document]]:
    for each in kind.__subclasses__():
        yield each
        yield from _all_structs(each)


def _described(kind: type[Document]) -> tuple[str, dict[str, str]]:
    """What the docstring says of the type and, under ``Attributes:``, of each field by its name in JSON."""
    about, _, attributes = inspect.cleandoc(kind.__doc__ or "").partition("\n\nAttributes:\n")
    fields = {}
    for entry in re.split(r"\n(?=    \w)", "\n" + attributes):
        names, colon, text = " ".join(entry.split()).partition(": ")
        for name in names.split(", ") if colon else ():
            fields[name] = text
    return " ".join(about.split()), fields
