"""What of the guest's benchmark needs no guest."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from offmap.errors import OffmapError

CONSOLE = "offmap-benchmark: chase_4k 356.8\r\noffmap-benchmark: chase_2m 1.5\r\noffmap-benchmark: copy 0.4617\r\n"


@pytest.fixture
def guest_memory(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("guest_memory")


def test_results_are_read_from_the_console(guest_memory: ModuleType) -> None:
    results = {"chase_4k": 356.8, "chase_2m": 1.5, "copy": 0.4617}
    assert guest_memory.parse_results(CONSOLE) == results
    assert guest_memory.parse_results("[    0.5] hello\r\n" + CONSOLE + "[    9.1] reboot: Power down\r\n") == results


@pytest.mark.parametrize("console", ["", CONSOLE[:40], CONSOLE.rsplit("offmap", 1)[0], CONSOLE[:-10], CONSOLE[:-3]])
def test_half_of_the_results_is_an_error(guest_memory: ModuleType, console: str) -> None:
    with pytest.raises(OffmapError, match="the guest did not finish"):
        guest_memory.parse_results(console)


def test_the_guest_is_one_static_program(guest_memory: ModuleType) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc: the guest of benchmarks/guest_memory.py was not compiled")
    program = guest_memory.static_program(Path(str(guest_memory.__file__)).with_suffix(".c"))
    assert program.startswith(b"\x7fELF")
    assert b"/ld-linux" not in program  # no interpreter
    assert program in guest_memory.guest()
