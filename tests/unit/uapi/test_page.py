"""offmap.uapi.page is the only place that says how big a page is."""

import ast
import mmap
from pathlib import Path

import pytest

import offmap
from offmap.uapi.page import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE

SOURCES = sorted(Path(offmap.__file__).parent.rglob("*.py"))


def definitions(source: str) -> list[str]:
    """The names that ``source`` gives to the page size, its shift or its mask, and its uses of Python's own."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
            if name.strip("_") in ("PAGE", "PAGE_SIZE", "PAGE_SHIFT", "PAGE_MASK", "PAGE_BITS"):
                found.append(name)
        elif isinstance(node, ast.Attribute) and node.attr in ("PAGESIZE", "getpagesize"):
            found.append(node.attr)
        elif isinstance(node, ast.BinOp) and isinstance(node.right, ast.Constant) and isinstance(node.op, ast.FloorDiv):
            found += ["// 4096"] * (node.right.value == 4096)
    return found


def test_the_page_is_this_machines() -> None:
    assert PAGE_SIZE == mmap.PAGESIZE == 1 << PAGE_SHIFT
    assert 0x12345 & PAGE_MASK == 0x12000


@pytest.mark.parametrize("source", ["PAGE = 4096", "_PAGE_SIZE: int = 4096", "a = mmap.PAGESIZE", "a = size // 4096"])
def test_a_second_definition_is_found(source: str) -> None:
    assert definitions(source)


def test_a_page_is_defined_once() -> None:
    found = {str(path): definitions(path.read_text()) for path in SOURCES if path.parts[-2:] != ("uapi", "page.py")}
    assert len(found) > 200
    assert {path: names for path, names in found.items() if names} == {}
