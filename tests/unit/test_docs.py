"""The documentation leads where it says."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from offmap.cli.parsers import whole_parser

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs/index.md").read_text()
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"({page.name})" not in index] == ["index.md"]


def commands_of(parser: argparse.ArgumentParser) -> Iterator[tuple[str, set[str]]]:
    """Each command by its words, and its options."""
    yield parser.prog, {option for action in parser._actions for option in action.option_strings}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from commands_of(command)


def test_every_option_of_a_command_exists() -> None:
    known = dict(commands_of(whole_parser()))
    wrong, seen = [], 0
    for page in PAGES:
        for line in re.findall(r"(?:^|`|\$ |# |bin/)(offmap [^`#\n]*)", page.read_text(), re.MULTILINE):
            words = line.split(" -- ")[0].split()
            command = next((" ".join(words[:n]) for n in (3, 2) if " ".join(words[:n]) in known), "offmap")
            options = {word.partition("=")[0] for word in re.findall(r"(?<![\w-])--\w[\w-]*", " ".join(words))}
            seen += len(options)
            wrong += [f"{page.name}: {command} {option}" for option in options - known[command] - known["offmap"]]
    assert wrong == []
    assert seen > 50


def test_every_schema_exists() -> None:
    code = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    named = {name for page in PAGES for name in re.findall(r"offmap-[a-z-]+/\d", page.read_text())}
    assert {name for name in named if f'"{name}"' not in code} == set()
