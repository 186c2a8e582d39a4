"""The table of system calls, compared with the installed header."""

import re
from pathlib import Path

import pytest

from offmap.uapi.syscall import NUMBERS

HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")


def test_the_numbers_are_the_headers() -> None:
    if not HEADER.exists():
        pytest.skip("the numbers of system calls were not compared: no kernel headers (install linux-libc-dev)")
    there = dict(re.findall(r"#define __NR_(\w+)\s+(\d+)", HEADER.read_text()))
    assert len(there) > 300
    assert {name: NUMBERS.get(name) for name in there} == {name: int(number) for name, number in there.items()}
