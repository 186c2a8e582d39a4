"""offmap's own modules, read in fewer steps: what is imported is what Python would have imported."""

import importlib
import json
import os
import py_compile
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from offmap import quick_imports

FACTS = """
import json, sys
from offmap import quick_imports
if sys.argv[1] == "quick":
    quick_imports.begin()
import offmap.cli.run, offmap.audit.report
loaded = {name: module for name, module in sys.modules.items() if name.startswith("offmap.")}
quick = sum(type(module.__spec__.loader) is quick_imports._Loader for module in loaded.values())
facts = {
    name: [m.__file__, m.__cached__, m.__package__, list(getattr(m, "__path__", [])), m.__spec__.origin,
           m.__spec__.has_location, m.__spec__.parent, sorted(vars(m))]
    for name, m in loaded.items()
}
from importlib.resources import files
from inspect import getsource
facts["source"] = getsource(offmap.cli.run)
facts["files"] = sorted(path.name for path in files("offmap.audit.report").iterdir() if path.name != "__pycache__")
print(json.dumps([quick, facts]))
"""

VALUE = """
import sys
from offmap import quick_imports
quick_imports.begin()
from offmap.folder import module
print(module.VALUE, type(module.__spec__.loader).__name__)
"""


def test_a_module_is_the_same_however_it_was_imported() -> None:
    def facts(how: str) -> tuple[int, dict[str, object]]:
        done = subprocess.run([sys.executable, "-c", FACTS, how], capture_output=True, text=True, check=True)
        quick, found = json.loads(done.stdout)
        return quick, found

    (none, usual), (quick, ours) = facts("usual"), facts("quick")
    assert none == 0
    assert quick > 50
    assert ours == usual


@pytest.fixture
def value(tmp_path: Path) -> Callable[..., str]:
    """Give a function that imports a module of a tree of its own, and says what was in it and who has loaded it."""
    folder = tmp_path / "offmap" / "folder"
    folder.mkdir(parents=True)
    (tmp_path / "offmap" / "__init__.py").touch()
    (folder / "__init__.py").touch()
    shutil.copy(quick_imports.__file__, tmp_path / "offmap")

    def run(*options: str, **environment: str) -> str:
        env = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1", **environment}
        done = subprocess.run(
            [sys.executable, *options, "-c", VALUE], env=env, capture_output=True, text=True, check=True, cwd=tmp_path
        )
        return done.stdout.strip()

    return run


def write(folder: Path, text: str, mtime: int = 1_700_000_000) -> Path:
    path = folder / "offmap" / "folder" / "module.py"
    path.write_text(text)
    os.utime(path, (mtime, mtime))
    return path


def compiled(path: Path) -> Path:
    return Path(py_compile.compile(str(path), doraise=True) or "")


def test_byte_code_is_believed_as_long_as_its_source_is_the_same(value: Callable[..., str], tmp_path: Path) -> None:
    path = write(tmp_path, "VALUE = 1")
    assert value() == "1 _Loader"
    write(tmp_path, "VALUE = 2")
    compiled(path)
    write(tmp_path, "VALUE = 3")  # of the same size and time
    assert value() == "2 _Loader"
    write(tmp_path, "VALUE = 4", 1_700_000_001)
    assert value() == "4 _Loader"
    write(tmp_path, "VALUE = 50")
    assert value() == "50 _Loader"


@pytest.mark.parametrize("damage", [lambda data: data[:-5], lambda data: data[:20], lambda _: b"", lambda d: b"x" + d])
def test_damaged_byte_code_is_not_believed(
    value: Callable[..., str], tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    cache = compiled(write(tmp_path, "VALUE = [1, 2]"))
    cache.write_bytes(damage(cache.read_bytes()))
    try:
        assert value() == "[1, 2] _Loader"
    except subprocess.CalledProcessError as error:  # as of Python's own
        assert "EOFError" in error.stderr


def test_other_ways_of_keeping_byte_code_are_pythons_business(value: Callable[..., str], tmp_path: Path) -> None:
    path = write(tmp_path, "VALUE = 1")
    py_compile.compile(str(path), invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
    write(tmp_path, "VALUE = 2")
    assert value() == "2 _Loader"
    assert value("-O") == "2 SourceFileLoader"
    assert value(PYTHONPYCACHEPREFIX=str(tmp_path)) == "2 SourceFileLoader"


def test_what_is_not_there_is_told_by_python(value: Callable[..., str]) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        value()
    assert "ImportError: cannot import name 'module' from 'offmap.folder'" in caught.value.stderr


def test_modules_of_others_are_left_to_python() -> None:
    find = quick_imports._Finder("").find_spec
    assert find("offmap", None) is None
    assert find("json", None) is None
    assert find("yaml.nodes", list(importlib.import_module("yaml").__path__)) is None
    assert find("offmap.cli.nothing", list(importlib.import_module("offmap.cli").__path__)) is None


LOADERS = """
import sys
sys.path[:1] = sys.argv[1:]
from offmap import quick_imports
quick_imports.begin()
import sched, xml.dom.pulldom, yaml
print([type(module.__spec__.loader).__name__ for module in (sched, xml, xml.dom.pulldom, yaml)], sched.__file__)
"""


def test_pythons_own_are_read_so_too_unless_a_folder_goes_before_them(tmp_path: Path) -> None:
    def loaders(*before: str) -> str:
        done = subprocess.run([sys.executable, "-c", LOADERS, *before], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    own = importlib.import_module("sched").__file__
    source = "SourceFileLoader"
    assert loaders() == f"{[*['_Loader'] * 3, source]} {own}"
    assert loaders("") == f"{[source, source, '_Loader', source]} {own}"
    (tmp_path / "sched.py").touch()
    assert loaders(str(tmp_path)).endswith(f"{tmp_path}/sched.py")


def test_the_commands_look_for_modules_in_pythons_folder_first(tmp_path: Path) -> None:
    script = shutil.copy(shutil.which("offmap", path=Path(sys.executable).parent) or "", tmp_path)
    text = Path(script).read_text()
    assert "sys.exit(main())" in text
    Path(script).write_text(text.replace("sys.exit(main())", "print(sys.path[0], sys.path[1])"))
    (tmp_path / "struct.py").write_text("raise SystemExit('a stranger')")
    run = [[sys.executable, script], [sys.executable, "-P", script]]
    first, second = (subprocess.run(words, capture_output=True, text=True, check=True).stdout for words in run)
    assert first == second
    assert str(tmp_path) not in first
