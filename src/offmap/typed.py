"""What of `typing` is needed while a program runs, for the modules that `offmap run` waits for.

`typing` imports `re`: together they are an eighth of the processor time from the start of the process to the guest's
first instruction. A type checker sees typing's own names here. For a running program a named tuple is one, and all
others are empty classes that may stand in annotations and among bases.
"""

import sys

__all__ = [
    "IO",
    "TYPE_CHECKING",
    "Any",
    "ClassVar",
    "Final",
    "NamedTuple",
    "NoReturn",
    "Protocol",
    "Self",
    "TypedDict",
    "final",
]

TYPE_CHECKING = False
if TYPE_CHECKING or sys.version_info >= (3, 14):  # where `typing` is quick, and annotations are made when asked for
    from typing import IO, Any, ClassVar, Final, NamedTuple, NoReturn, Protocol, Self, TypedDict, final
else:
    from collections import namedtuple

    class _Word:
        def __class_getitem__(cls, item):
            return cls

    class Any(_Word):
        pass

    class IO(_Word):
        pass

    class ClassVar(_Word):
        pass

    class Final(_Word):
        pass

    class NoReturn(_Word):
        pass

    class Self(_Word):
        pass

    class Protocol:
        pass

    class TypedDict(dict):
        def __init_subclass__(cls, total=True):
            pass

    def final(decorated):
        return decorated

    class _NamedTuple(type):
        def __new__(mcs, name, bases, space):
            if not bases:
                return super().__new__(mcs, name, bases, space)
            fields = space.get("__annotations__", {})
            made = namedtuple(
                name, fields, defaults=[space[f] for f in fields if f in space], module=space["__module__"]
            )
            made.__annotations__ = made.__new__.__annotations__ = dict(fields)
            for key, value in space.items():
                if key not in fields and key not in ("__annotations__", "__module__", "__qualname__"):
                    setattr(made, key, value)
            return made

    class NamedTuple(metaclass=_NamedTuple):
        pass
