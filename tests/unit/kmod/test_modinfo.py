"""What a module says of itself, from files that gcc makes and from broken ones."""

import shutil
import subprocess
from pathlib import Path

import pytest

from offmap.errors import OffmapError
from offmap.kmod.modinfo import is_signed, modinfo, release_of

SOURCE = r"""
static const char info[] __attribute__((section(".modinfo"), used)) =
    "vermagic=6.12.1-test SMP preempt mod_unload\0srcversion=ABC\0parm=a:b\0parm=c:d";
"""


@pytest.fixture
def module(tmp_path: Path) -> Path:
    """Give a file that looks like a module."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc: no module could be made to read (install gcc)")
    (tmp_path / "m.c").write_text(SOURCE)
    subprocess.run(["gcc", "-c", "-o", tmp_path / "m.ko", tmp_path / "m.c"], check=True)
    return tmp_path / "m.ko"


def test_modinfo(module: Path) -> None:
    assert modinfo(module) == {"vermagic": "6.12.1-test SMP preempt mod_unload", "srcversion": "ABC", "parm": "a:b"}
    assert release_of(module) == "6.12.1-test"


def test_signature(module: Path) -> None:
    assert not is_signed(module)
    module.write_bytes(module.read_bytes() + b"PKCS7" + b"~Module signature appended~\n")
    assert is_signed(module)
    assert release_of(module) == "6.12.1-test"


def test_broken_files_end_in_one_line(module: Path, tmp_path: Path) -> None:
    whole = module.read_bytes()
    for length in (0, 3, 63, 64, len(whole) // 2, len(whole) - 1):
        module.write_bytes(whole[:length])
        with pytest.raises(OffmapError, match="is no kernel module"):
            modinfo(module)
    with pytest.raises(OffmapError, match="cannot read"):
        modinfo(tmp_path / "none.ko")
