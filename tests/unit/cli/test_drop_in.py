"""A link with a VMM's name: what the configuration makes of it."""

from pathlib import Path

import pytest

from offmap.cli.drop_in import words_for
from offmap.errors import OffmapError


def test_a_table_gives_the_vmm_and_the_options(tmp_path: Path) -> None:
    config = tmp_path / "wrap.toml"
    config.write_text('[qemu]\nvmm = "/usr/bin/qemu"\noptions = ["--memory", "pool"]\n[other]\nvmm = "/bin/vmm"\n')
    assert words_for("qemu", config) == ["--memory", "pool", "--", "/usr/bin/qemu"]
    assert words_for("other", config) == ["--", "/bin/vmm"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "does not say what vmm is; add the table"),
        ("[other]\nvmm = 'x'", "does not say what vmm is"),
        ("[vmm]\noptions = []", "does not say what vmm is"),
        ("vmm = 'x'", "does not say what vmm is"),
        ("[vmm]\nvmm = 'x'\noptions = '--memory pool'", "options of .vmm. is not understood"),
        ("[vmm]\nvmm = 'x'\nmemory = 'pool'", "memory of .vmm. is not understood"),
        ("[vmm", "cannot be read"),
    ],
)
def test_what_it_does_not_say_is_told(tmp_path: Path, text: str | None, said: str) -> None:
    config = tmp_path / "wrap.toml"
    if text is not None:
        config.write_text(text)
    with pytest.raises(OffmapError, match=said):
        words_for("vmm", config)
