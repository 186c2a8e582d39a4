"""Command lines of plain words: long options in full, each with its value. A start need not import argparse for them.

argparse and what it imports is a tenth of the processor time that a guest waits for. Whatever else there is (a short
form, ``--help``, a mistake) is left to it, so that it is understood and told in one place.
"""

from offmap.errors import OffmapError

TYPE_CHECKING = False  # no `typing` either
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Collection, Sequence

    _Option = tuple[str, Callable[[str], object], Collection[object] | None, str | None, object, str]


class WrongUse(OffmapError):
    """A command line that its parser refuses.

    Attributes:
        program: the words of the command, like ``offmap lab exec``.
    """

    def __init__(self, program: str, message: str) -> None:
        self.program = program
        super().__init__(message, f"see {program} --help")


class _Values:
    """What argparse.Namespace is."""


class PlainParser:
    """Takes argparse's place in the ``add_parser`` of a command without subcommands. It leaves positionals out."""

    def __init__(self) -> None:
        self._options: dict[str, _Option] = {}
        self._values: dict[str, object] = {}

    def add_parser(self, _name: str, **_help: object) -> "PlainParser":
        return self

    def add_argument_group(self, *_help: str) -> "PlainParser":
        return self

    def set_defaults(self, **values: object) -> None:
        self._values.update(values)

    def add_argument(
        self,
        name: str,
        *,
        action: str = "store",
        default: object = None,
        type: "Callable[[str], object]" = str,  # argparse's name
        choices: "Collection[object] | None" = None,
        nargs: str | None = None,
        const: object = None,
        dest: str = "",
        **_help: object,
    ) -> None:
        if name.startswith("--"):
            dest = dest or name[2:].replace("-", "_")
            self._options[name] = (action, type, choices, nargs, const, dest)
            self._values[dest] = False if action == "store_true" else default

    def parse(self, words: "Sequence[str]") -> "argparse.Namespace | None":
        """What argparse would make of the words; None if they are not plain."""
        values = dict(self._values)
        rest = list(words)
        while rest:
            name, equals, text = rest.pop(0).partition("=")
            if name not in self._options or (equals and not text):
                return None
            action, convert, choices, nargs, value, dest = self._options[name]
            if action == "store_true":
                if equals:
                    return None
                value = True
            elif equals or (rest and rest[0] and rest[0][0] != "-"):
                try:
                    value = convert(text if equals else rest.pop(0))
                except Exception:  # a mistake, of whatever kind
                    return None
                if choices is not None and value not in choices:
                    return None
            elif nargs != "?":
                return None
            if action == "append":
                before = values[dest]
                value = [*(before if isinstance(before, list) else ()), value]
            values[dest] = value
        made = _Values()
        made.__dict__.update(values)
        return made  # type: ignore[return-value]  # argparse's class without argparse
