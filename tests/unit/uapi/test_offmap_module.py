"""The module's ABI in Python against kernel/module/offmap.h, by one C program."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from offmap.kmod.source import source_folder
from offmap.uapi import offmap_module as uapi

STRUCTS = (uapi.offmap_unplug, uapi.offmap_translate, uapi.offmap_secretmem)
NUMBERS = ("OFFMAP_UNPLUG", "OFFMAP_TRANSLATE", "OFFMAP_BIND_SECRETMEM", "OFFMAP_GUARD", "OFFMAP_ANY_NODE")


def test_abi_is_the_headers(tmp_path: Path) -> None:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no gcc: the module's ABI was not compared with its header (install gcc)")
    ours = []
    lines = []
    for struct in STRUCTS:
        name = struct.__name__
        ours.append(ctypes.sizeof(struct))
        lines.append(f"sizeof(struct {name})")
        for field, *_ in struct._fields_:
            ours.append(getattr(struct, field).offset)
            lines.append(f"offsetof(struct {name}, {field})")
    for number in NUMBERS:
        ours.append(getattr(uapi, number))
        lines.append(number)
    source = tmp_path / "abi.c"
    prints = "\n".join(f'printf("%lld\\n", (long long){line});' for line in lines)
    source.write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "offmap.h"\nint main(void) {{\n{prints}\n}}\n'
    )
    program = tmp_path / "abi"
    subprocess.run([compiler, "-I", str(source_folder()), "-o", str(program), str(source)], check=True)
    theirs = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    assert dict(zip(lines, map(int, theirs), strict=True)) == dict(zip(lines, ours, strict=True))
