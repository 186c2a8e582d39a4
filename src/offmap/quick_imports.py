"""offmap's own modules and Python's, found and read with half the steps that Python takes for any module.

A start of `offmap run` or `offmap wrap` imports some ninety of the one kind and twenty of the other, each from one
known folder, with its byte code beside it. What differs in anything (no byte code or old one, hashes instead of times,
another place for it, a folder that goes before Python's) is left to Python.
"""

import os
import sys
from marshal import loads
from posix import O_CLOEXEC, O_RDONLY, close, read, stat
from posix import open as open_file
from struct import Struct

TYPE_CHECKING = False  # this is what others wait for
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec, SourceFileLoader
    from types import CodeType, ModuleType
else:
    ModuleSpec, SourceFileLoader = type(__spec__), type(__spec__.loader)  # without importing importlib

_HEADER = 16  # bytes: a magic number, and _FACTS (Lib/importlib/_bootstrap_external.py, _validate_timestamp_pyc)
_FACTS = Struct("<III")  # flags, the source's time and size
_MASK = (1 << 32) - 1


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> "CodeType | None":
        folder, _, name = self.path.rpartition("/")
        try:
            source = stat(self.path)
            fd = open_file(f"{folder}/__pycache__/{name[:-3]}.{sys.implementation.cache_tag}.pyc", O_RDONLY | O_CLOEXEC)
        except OSError:
            return super().get_code(fullname)
        try:
            data = read(fd, 2 * source.st_size + 4096)
        finally:
            close(fd)
        if data[:_HEADER] != _magic + _FACTS.pack(0, int(source.st_mtime) & _MASK, source.st_size & _MASK):
            return super().get_code(fullname)
        try:
            code: CodeType = loads(memoryview(data)[_HEADER:])
        except (EOFError, ValueError, TypeError):  # cut off
            return super().get_code(fullname)
        return code


class _Finder:
    def __init__(self, library: str) -> None:
        self._library = library

    def find_spec(
        self, name: str, path: "Sequence[str] | None", _target: "ModuleType | None" = None
    ) -> ModuleSpec | None:
        package, _, last = name.rpartition(".")
        if package:
            top = package.partition(".")[0]
            if path is None or len(path) != 1 or (top != "offmap" and top not in sys.stdlib_module_names):
                return None
            folder = path[0]
        elif self._library and name in sys.stdlib_module_names:
            folder = self._library
        else:
            return None
        place = f"{folder}/{last}"
        for file, is_package in ((f"{place}.py", False), (f"{place}/__init__.py", True)):
            try:
                stat(file)
            except OSError:
                continue
            spec = ModuleSpec(name, _Loader(name, file), origin=file, is_package=is_package)
            spec.has_location = True
            if is_package:
                spec.submodule_search_locations = [place]
            return spec
        return None


def begin() -> None:
    """Import so from now on, if this Python keeps byte code where it usually does."""
    usual = SourceFileLoader.__name__ == "SourceFileLoader" and not sys.flags.optimize and sys.pycache_prefix is None
    if not usual or any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    # After the finders of what is within the interpreter, and before the one that goes through sys.path.
    place = next((number for number, finder in enumerate(sys.meta_path) if finder is _python.PathFinder), None)
    if place is not None:
        library = os.__file__.rpartition("/")[0]
        # sys.path begins with a zip file of the library, which is hardly ever there: nothing can be imported from it.
        first = next((entry for entry in sys.path if sys.path_importer_cache.get(entry, entry) is not None), "")
        sys.meta_path.insert(place, _Finder(library if first == library else ""))


_python = sys.modules[SourceFileLoader.__module__]
_magic: bytes = getattr(_python, "MAGIC_NUMBER", b"")
