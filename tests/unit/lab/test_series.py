"""The project's own patches and configuration, and what identifies a kernel built from them."""

import re
from pathlib import Path

import pytest

from offmap.lab.errors import LabError
from offmap.lab.series import PatchSeries, all_series, config_options, missing_options, patch_series

PATCH = """From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001
From: Somebody <somebody@example.org>
Subject: [PATCH 1/2] mm: a subject that is long enough to be continued on a
 second line

Why.
"""
DIFF = """diff --git a/mm/a.c b/mm/a.c
--- a/mm/a.c
+++ b/mm/a.c
@@ -1 +1,2 @@
 int a;
+int b;
"""


def series(folder: Path, *patches: str, config: str = "CONFIG_KVM=y\n") -> PatchSeries:
    (folder / "lab.config").write_text(config)
    paths = []
    for number, text in enumerate(patches, 1):
        paths.append(folder / f"{number:04}-x.patch")
        paths[-1].write_text(text)
    return PatchSeries("7.3", tuple(paths), folder / "lab.config")


def test_every_series_of_the_project_is_numbered_signed_and_has_a_message() -> None:
    found = list(all_series())
    assert [s.spec for s in found] == ["patched:7.3", "patched:7.3+debug"]
    for s in found:
        assert s.patches, s.name
        assert patch_series(s.spec) == s
        assert [path.name[:4] for path in s.patches] == [f"{n:04}" for n in range(1, len(s.patches) + 1)]
        for path in s.patches:
            message, _, diff = path.read_text().partition("\n---\n")
            assert "Signed-off-by: The offmap authors <" in message, path
            assert len(message.splitlines()) > 12, f"{path}: say why"
            assert "diff --git a/" in diff, path
        assert all(": " in subject for subject in s.subjects())


def test_the_configuration_names_each_option_once_and_nothing_of_a_machine() -> None:
    plain, debug = all_series()
    text = "".join(path.read_text() for path in debug.configs())
    assert text.startswith(plain.config.read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"CONFIG_\w+=(y|\d+)", line) for line in lines)
    assert len(config_options(text)) == len(lines)


def test_an_unknown_series_is_refused() -> None:
    with pytest.raises(
        LabError, match=r"offmap has no patches for patched:6\.1; choose patched:7\.3 or patched:7\.3\+debug"
    ):
        patch_series("patched:6.1")


def test_subjects(tmp_path: Path) -> None:
    assert series(tmp_path, PATCH, "no header").subjects() == [
        "mm: a subject that is long enough to be continued on a second line",
        "0002-x.patch",
    ]


def test_the_key_changes_with_all_that_a_kernel_is_made_from(tmp_path: Path) -> None:
    keys = {series(tmp_path, PATCH + DIFF).key("1")}
    keys.add(series(tmp_path, PATCH + DIFF).key("1"))
    assert len(keys) == 1
    keys.add(series(tmp_path, PATCH + DIFF).key("2"))
    keys.add(series(tmp_path, PATCH + DIFF + "+another line\n").key("1"))
    keys.add(series(tmp_path, PATCH + DIFF, DIFF).key("1"))
    keys.add(series(tmp_path, PATCH).key("1"))
    keys.add(series(tmp_path, PATCH + DIFF, config="CONFIG_KVM=m\n").key("1"))
    assert len(keys) == 6


def test_the_key_stays_with_what_no_kernel_is_made_from(tmp_path: Path) -> None:
    key = series(tmp_path, PATCH + DIFF).key("1")
    assert series(tmp_path, PATCH.replace("1/2", "2/3") + "Another message.\n" + DIFF).key("1") == key
    for path in ("tools/testing/selftests/mm/a.c", "Documentation/a.rst", "MAINTAINERS"):
        other = DIFF.replace("mm/a.c", path)
        assert series(tmp_path, PATCH + other + DIFF, PATCH + other).key("1") == key


def test_options_that_kconfig_dropped_are_named() -> None:
    wanted = "# a comment\nCONFIG_A=y\nCONFIG_B=y\nCONFIG_C=n\nCONFIG_D=16\nCONFIG_E=n\n"
    config = "CONFIG_A=y\n# CONFIG_B is not set\n# CONFIG_C is not set\nCONFIG_D=8\n"
    assert missing_options(wanted, config) == ["CONFIG_B=y", "CONFIG_D=16"]
