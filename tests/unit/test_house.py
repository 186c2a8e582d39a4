"""The recipes of CONTRIBUTING.md: what they add is there, and no other file need be touched."""

import subprocess
import sys
from typing import Any

import pytest


def python(house: Any, *argv: str) -> str:
    done = subprocess.run(
        [sys.executable, *argv], env=house.environment, cwd=house.tree, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("recipe", ["backend", "device", "question"])
def test_a_recipe_names_all_files_and_no_other(house: Any, recipe: str) -> None:
    assert house.touched[recipe] == house.listed[recipe]
    assert len(house.listed[recipe]) == 3


def test_the_copy_is_what_is_imported(house: Any) -> None:
    assert python(house, "-c", "import offmap; print(offmap.__file__)").startswith(str(house.tree))


def test_a_kind_of_ram_is_offered_everywhere(house: Any) -> None:
    assert ", lent," in " ".join(python(house, "-m", "offmap", "run", "--help").split())
    assert "lent on debian:6.12" in python(house, "-m", "offmap", "compare", "--list", "--backend", "lent")
    assert "anon lent" in python(house, "-m", "offmap", "completion", "bash")


def test_a_device_is_an_option(house: Any) -> None:
    assert "--dice sides=N" in python(house, "-m", "offmap", "run", "--help")


def test_a_question_is_in_the_report_and_in_its_schema(house: Any) -> None:
    program = "from offmap.compare.questions import CATALOGUE; print(*CATALOGUE)"
    assert "works.steal_time works.uptime works.async_pf" in python(house, "-c", program)


def test_types_are_right_in_the_changed_modules(house: Any) -> None:
    python(house, "-c", "import offmap.compare.whole_cell, offmap.devices.virtio.dice, offmap.memory.lent")
