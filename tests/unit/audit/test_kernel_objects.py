"""Symbols of the kernel: read once, no module's, and a refusal is not for ever."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from offmap.audit import kernel_objects
from offmap.audit.btf import Unknown
from offmap.audit.kernel_objects import module_symbol, symbol

TEXT = "ffffffff81000000 T _stext\nffffffff82a0f940 D init_task\nffffffffc0a01000 d vm_list\t[kvm]\n"


@pytest.fixture
def kallsyms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "kallsyms"
    monkeypatch.setattr(kernel_objects, "_KALLSYMS", str(path))
    kernel_objects._known.clear()
    yield path
    kernel_objects._known.clear()


def test_a_symbol_is_read_once(kallsyms: Path) -> None:
    kallsyms.write_text(TEXT)
    assert symbol("init_task") == 0xFFFF_FFFF_82A0_F940
    kallsyms.unlink()
    assert symbol("init_task") == 0xFFFF_FFFF_82A0_F940


def test_a_refusal_is_not_remembered(kallsyms: Path) -> None:
    with pytest.raises(Unknown, match="cannot read"):
        symbol("init_task")
    kallsyms.write_text("0000000000000000 D init_task\n")  # as kernel.kptr_restrict has it
    with pytest.raises(Unknown, match="does not tell"):
        symbol("init_task")
    kallsyms.write_text(TEXT)
    assert symbol("init_task") == 0xFFFF_FFFF_82A0_F940


def test_of_two_symbols_of_one_name_neither_is_taken(kallsyms: Path) -> None:
    kallsyms.write_text(TEXT + "ffffffff82a0f990 d init_task\n")
    with pytest.raises(Unknown, match="does not tell"):
        symbol("init_task")


def test_a_modules_symbol_which_may_move_is_not_found(kallsyms: Path) -> None:
    kallsyms.write_text(TEXT)
    with pytest.raises(Unknown, match="does not tell"):
        symbol("vm_list")


def test_a_modules_symbol_is_found_by_the_module(kallsyms: Path) -> None:
    kernel_objects._module_symbol.cache_clear()
    kallsyms.write_text(TEXT)
    assert module_symbol("vm_list", "kvm") == 0xFFFF_FFFF_C0A0_1000
    assert module_symbol("init_task", "kvm") == 0xFFFF_FFFF_82A0_F940  # built in
    with pytest.raises(Unknown, match="does not tell"):
        module_symbol("vm_list", "kvm_amd")
