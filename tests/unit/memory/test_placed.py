"""What can be placed under a VMM, and what is refused before the VMM is started."""

from pathlib import Path

import pytest

from offmap.errors import OffmapError
from offmap.memory.backend import parse_backend
from offmap.uapi import offmap_module as uapi


def test_a_host_without_the_module_is_told_before_the_vmm_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uapi, "DEVICE", str(tmp_path / "offmap"))
    with pytest.raises(OffmapError, match="offmap module load"):
        parse_backend("unplugged").placed_from()


@pytest.mark.parametrize("memory", ["anon", "reserved", "secretmem"])
def test_what_is_no_file_cannot_be_placed(memory: str) -> None:
    with pytest.raises(OffmapError, match="cannot be placed under a VMM"):
        parse_backend(memory).placed_from()
