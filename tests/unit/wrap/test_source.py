"""What can be placed under a VMM, and what is refused before the VMM is started."""

from pathlib import Path

import pytest

from offmap.errors import OffmapError
from offmap.uapi import offmap_module as uapi
from offmap.wrap.source import source_for


def test_a_host_without_the_module_is_told_before_the_vmm_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uapi, "DEVICE", str(tmp_path / "offmap"))
    with pytest.raises(OffmapError, match="offmap module load"):
        source_for("unplugged").check()


@pytest.mark.parametrize("memory", ["anon", "reserved", "secretmem"])
def test_what_is_no_file_cannot_be_placed(memory: str) -> None:
    with pytest.raises(OffmapError, match="cannot be placed under a VMM"):
        source_for(memory)
