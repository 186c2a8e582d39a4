"""Memory that the guest cannot write to does not count where it holds what everybody may read."""

import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from offmap.audit import firmware
from offmap.audit.firmware import public_files, public_pages
from offmap.audit.kcore import Kcore

PAGE = 4096
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="not root: files that only root may write cannot be made")


class Ram(Kcore):
    """Two pages of memory, and one that kcore fills with zeroes."""

    def __init__(self, *pages: bytes) -> None:
        self.pages = pages

    def close(self) -> None:
        pass

    def in_ram(self, pa: NDArray[np.uint64]) -> NDArray[np.bool_]:
        return np.asarray(pa < len(self.pages) * PAGE, dtype=np.bool_)

    def zero_filled(self, pa: NDArray[np.uint64]) -> NDArray[np.bool_]:
        return np.asarray(pa == (len(self.pages) - 1) * PAGE, dtype=np.bool_)

    def read_pages(self, pa: NDArray[np.uint64], out: NDArray[np.uint64]) -> None:
        for row, at in enumerate(pa.tolist()):
            out[row] = np.frombuffer(self.pages[at // PAGE], dtype=np.uint64)


@needs_root
def test_pages_that_stand_in_a_public_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firmware, "FOLDERS", (str(tmp_path),))
    tmp_path.chmod(0o755)
    bios, secret, zero = b"\xea" * PAGE, b"k" * PAGE, bytes(PAGE)
    (tmp_path / "bios.bin").write_bytes(zero + bios)
    (tmp_path / "bios.bin").chmod(0o644)
    for name, mode in (("private", 0o600), ("shared", 0o664)):
        (tmp_path / name).write_bytes(secret)
        (tmp_path / name).chmod(mode)
    (tmp_path / "others").write_bytes(secret)
    os.chown(tmp_path / "others", 1000, 1000)
    (tmp_path / "link").symlink_to("private")
    assert [path.name for path in public_files(tmp_path)] == ["bios.bin"]
    # The last one kcore does not show: that it reads as zeroes says nothing. The fourth is none of its RAM.
    assert public_pages(Ram(bios, secret, zero), np.array([2, 0, 1, 3])) == 1
    assert public_pages(Ram(bios, secret, zero), np.array([], dtype=np.int64)) == 0


def test_a_folder_that_is_not_there_has_no_files(tmp_path: Path) -> None:
    assert not list(public_files(tmp_path / "nowhere"))
