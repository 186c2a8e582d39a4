"""What of a VMM's audit of its own fresh RAM lets the guest have it."""

import json
import subprocess
from typing import Any

import pytest

from offmap.cli.self_audit import keep_from_guest
from offmap.errors import BackendRefused
from offmap.memory.iomem import PhysicalRange
from offmap.memory.secretmem import Secretmem

SEEN = {"ram_pages": 100, "direct_map_pages": 0, "unknown_pages": 0, "not_populated_pages": 0, "unknown_reasons": {}}


def vet(monkeypatch: pytest.MonkeyPatch, status: int, **pages: Any) -> tuple[list[PhysicalRange], list[str]]:
    result = {"pages": SEEN | pages, "mapped_guest_ranges": [[0x200000, 8192]] if status == 1 else []}

    def run(argv: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(argv, status, json.dumps(result), "offmap audit: no\n")

    monkeypatch.setattr(subprocess, "run", run)
    said: list[str] = []
    return list(keep_from_guest(Secretmem(), said.append)), said


def test_hidden_ram_is_the_guests(monkeypatch: pytest.MonkeyPatch) -> None:
    assert vet(monkeypatch, 0) == ([], [])


def test_aliased_pages_are_kept_back(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, said = vet(monkeypatch, 1)
    assert kept == [PhysicalRange(0x200000, 0x202000)]
    assert said == ["2 pages of the guest's RAM are aliased in the host kernel and kept from the guest"]


@pytest.mark.parametrize(
    ("status", "pages", "message"),
    [
        (1, {"direct_map_pages": 1}, "1 of 100 pages .* are in its direct map"),
        # An alias beside them makes the verdict "exposed", whatever could not be seen.
        (1, {"unknown_pages": 7, "unknown_reasons": {"its level 2 entry kept changing": 7}}, "7 of .*kept changing"),
        (1, {"not_populated_pages": 3}, "3 of 100 pages .*not populated"),
        (3, {}, "cannot be found and kept from the guest: no"),
        (2, {}, "cannot be found and kept from the guest: no"),
        (-9, {}, "cannot be found and kept from the guest: no"),
    ],
)
def test_what_was_not_seen_is_refused(
    monkeypatch: pytest.MonkeyPatch, status: int, pages: dict[str, Any], message: str
) -> None:
    with pytest.raises(BackendRefused, match=message):
        vet(monkeypatch, status, **pages)
