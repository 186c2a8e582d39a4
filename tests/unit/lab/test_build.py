"""What happens before and after make: missing tools, patches that apply or do not, complaints, caches."""

import json
import subprocess
from pathlib import Path

import pytest

from offmap.lab import apt, build
from offmap.lab.build import apply_patches, built_tree, first_complaint, missing_packages, sweep
from offmap.lab.cache import locked, sha256_of
from offmap.lab.errors import LabError
from offmap.lab.kernel_tree import write_manifest
from offmap.lab.series import PatchSeries
from offmap.lab.source import KernelSource, kernel_source

DIFF = "--- a/mm/gup.c\n+++ b/mm/gup.c\n@@ -1,3 +1,3 @@\n one\n-two\n+{}\n three\n"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OFFMAP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def patch(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_what_is_missing_is_named_by_its_package(tmp_path: Path) -> None:
    (tmp_path / "stdlib.h").touch()
    assert missing_packages(lambda tool: None if tool in {"flex", "ld"} else tool, [tmp_path]) == [
        "binutils",
        "flex",
        "libelf-dev",
    ]
    (tmp_path / "gelf.h").touch()
    assert missing_packages(lambda tool: tool, [tmp_path]) == []


def test_patches_apply_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "mm").mkdir()
    (tmp_path / "mm/gup.c").write_text("one\ntwo\nthree\n")
    first = patch(tmp_path, "0001.patch", DIFF.format("2"))
    second = patch(tmp_path, "0002.patch", DIFF.replace("-two", "-2").format("zwei"))
    said: list[str] = []
    apply_patches(tmp_path, [first, second], said.append)
    assert (tmp_path / "mm/gup.c").read_text() == "one\nzwei\nthree\n"
    assert said == ["applying 0001.patch", "applying 0002.patch"]


@pytest.mark.parametrize(
    "text", [DIFF.format("2").replace("-two", "-ten"), DIFF.replace("gup.c", "none.c").format("2")]
)
def test_a_patch_that_does_not_apply_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "mm").mkdir()
    (tmp_path / "mm/gup.c").write_text("one\ntwo\nthree\n")
    with pytest.raises(LabError, match=r"^0001\.patch does not apply to this source: .*; the source has changed"):
        apply_patches(tmp_path, [patch(tmp_path, "0001.patch", text)])


@pytest.mark.parametrize(
    ("output", "complaint"),
    [
        ("  CC a.o\na.c:3:1: error: no such thing\nmake: *** [a] Error 1\n", "a.c:3:1: error: no such thing"),
        ("/bin/sh: 1: flex: not found\nmake: *** [x] Error 127\n", "/bin/sh: 1: flex: not found"),
        ("make: *** No rule to make target 'b'.\n", "make: *** No rule to make target 'b'."),
        ("", "make failed and did not say why"),
    ],
)
def test_the_first_complaint_is_shown(output: str, complaint: str) -> None:
    assert first_complaint(output) == complaint


def test_a_build_without_its_tools_ends_in_one_line(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "kernel_source", lambda _: KernelSource("7.3.4-1", tmp_path / "none.deb"))
    monkeypatch.setattr(build, "missing_packages", lambda _: ["flex", "bison"])
    with pytest.raises(LabError, match=r"lacks flex, bison; run: apt-get install flex bison$"):
        build.patched_kernel("patched:7.3")


def test_a_built_kernel_is_found_until_a_patch_changes(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "lab.config").write_text("CONFIG_KVM=y\n")
    series = PatchSeries("7.3", (patch(tmp_path, "0001.patch", "x"),), tmp_path / "lab.config")
    store = cache / f"kernels/patched-7.3-{series.key('7.3.4-1')}"
    (store / "tree/boot").mkdir(parents=True)
    (store / "version").write_text("7.3.4-1\n")
    assert built_tree(series) is None
    (store / "tree/boot/vmlinuz-7.3.4").write_text("image")
    write_manifest(store / "tree", [store / "tree/boot/vmlinuz-7.3.4"])
    assert built_tree(series) == store / "tree"
    (tmp_path / "0001.patch").write_text("diff --git a/mm/x.c b/mm/x.c\n")
    assert built_tree(series) is None


def test_a_source_in_the_cache_is_used_only_if_it_is_what_was_verified(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = cache / "sources/linux-source-7.3"
    store.mkdir(parents=True)
    deb = store / "x.deb"
    deb.write_bytes(b"package")
    (store / "package.json").write_text(json.dumps({"version": "7.3.4-1", "file": "x.deb", "sha256": sha256_of(deb)}))
    monkeypatch.setattr(apt, "have_apt", lambda: False)
    assert kernel_source("7.3") == KernelSource("7.3.4-1", deb)
    deb.write_bytes(b"something else")
    with pytest.raises(LabError, match=r"cannot get the source of Debian's kernel 7\.3: this machine has no apt-get"):
        kernel_source("7.3")


def test_a_source_package_is_unpacked_to_the_tree_it_holds(tmp_path: Path) -> None:
    tree = tmp_path / "linux-source-7.3"
    tree.mkdir()
    (tree / "Kbuild").write_text("obj-y\n")
    package = tmp_path / "package"
    (package / "usr/src").mkdir(parents=True)
    (package / "DEBIAN").mkdir()
    (package / "DEBIAN/control").write_text(
        "Package: linux-source-7.3\nVersion: 1\nArchitecture: all\nMaintainer: nobody <n@example.org>\nDescription: x\n"
    )
    tarball = package / "usr/src/linux-source-7.3.tar.xz"
    subprocess.run(["tar", "-cJf", str(tarball), "-C", str(tmp_path), tree.name], check=True)
    deb = tmp_path / "s.deb"
    subprocess.run(["dpkg-deb", "--build", str(package), str(deb)], check=True, capture_output=True)
    (tmp_path / "out").mkdir()
    KernelSource("1", deb).unpack(tmp_path / "out")
    assert (tmp_path / "out/Kbuild").read_text() == "obj-y\n"
    deb.write_bytes(deb.read_bytes()[:200])
    (tmp_path / "again").mkdir()
    with pytest.raises(LabError, match=r"cannot unpack s\.deb"):
        KernelSource("1", deb).unpack(tmp_path / "again")


def test_what_killed_builds_left_behind_is_swept_and_nothing_else(tmp_path: Path) -> None:
    for key in "ab":
        (tmp_path / f"patched-7.3-{key}/.work.x/source").mkdir(parents=True)
        (tmp_path / f"patched-7.3-{key}/tree").mkdir()
    (tmp_path / "debian-7.3/.tree.x").mkdir(parents=True)
    with locked(tmp_path / "patched-7.3-b.lock"):  # a build in progress
        sweep(tmp_path)
    kept = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*")}
    assert kept == {"patched-7.3-a/tree", "patched-7.3-b/.work.x", "patched-7.3-b/tree", "debian-7.3/.tree.x"}
