"""The one parser of ``VALUE,option=value,…``, as ``--memory``, ``--drive`` and their like take it."""

from collections.abc import Callable, Collection

from offmap.errors import OffmapError
from offmap.typed import TYPE_CHECKING, NoReturn, Self

if TYPE_CHECKING:
    from typing import TypeVar

    _T = TypeVar("_T")


class Options:
    """What the user wrote, word by word. Leaving the ``with`` block refuses the words that were not taken.

    Args:
        text: what the user wrote.
        of: what takes it, for messages: ``--drive``.
        usage: how to write it, as an imperative: the remedy of every refusal.
        leads: the text begins with a value that is no option: a path, a name.
        flags: words that stand at the beginning without a value.

    Attributes:
        lead: that value; may be empty.

    Raises:
        OffmapError: a word is not ``option=value``, or an option is there twice without being taken by `every`.
    """

    def __init__(self, text: str, of: str, usage: str, *, leads: bool = False, flags: Collection[str] = ()) -> None:
        self._text, self._of, self._usage = text, of, usage
        words = text.split(",") if text or not leads else []
        self.lead = words.pop(0) if leads and words else ""
        self._pairs: list[tuple[str, str]] = []
        for number, word in enumerate(words):
            key, _, value = word.partition("=")
            if word in flags and not number:
                self._pairs.append((word, ""))
            elif not key or not value:
                self._refuse(word)
            else:
                self._pairs.append((key, value))

    def every(self, key: str) -> list[str]:
        """Take the values of an option that may be there several times, in order."""
        values = [value for name, value in self._pairs if name == key]
        self._pairs = [pair for pair in self._pairs if pair[0] != key]
        return values

    def text(self, key: str, default: "_T", convert: "Callable[[str], _T]") -> "_T":
        """Take an option's value, by `convert`, which refuses what it cannot be; `default` where it is not there."""
        values = self.every(key)
        if len(values) > 1:
            self.refuse(f"{key} is there twice")
        return convert(values[0]) if values else default

    def flag(self, *names: str) -> bool:
        """Take a word that has no value, by any of its names."""
        return bool([name for name in names if self.every(name)])

    def switch(self, key: str) -> bool:
        """Take an option that is on or off, and off where it is not there."""

        def convert(value: str) -> bool:
            if value not in ("on", "off"):
                self.refuse(f"{key} is on or off, not {value!r}")
            return value == "on"

        return self.text(key, False, convert)

    def number(self, key: str, default: "_T", least: int, most: int) -> "int | _T":
        """Take a whole number from `least` to `most`."""

        def convert(value: str) -> int:
            if not value.isascii() or not value.isdecimal() or len(value) > 20 or not least <= int(value) <= most:
                self.refuse(f"{key} is a number from {least} to {most}, not {value!r}")
            return int(value)

        unset: int | _T = default
        return self.text(key, unset, convert)

    def refuse(self, why: str, remedy: str = "") -> NoReturn:
        """Refuse all of it. Raises OffmapError: always."""
        raise OffmapError(f"{self._of} cannot be {self._text!r}", remedy or self._usage, why=why)

    def _refuse(self, word: str) -> NoReturn:
        self.refuse(f"there is no option {word!r}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None and self._pairs:
            self._refuse("=".join(self._pairs[0]))
