"""Building the module: where its sources are, and every reason why it cannot be built or loaded."""

import os
import tomllib
from pathlib import Path

import pytest

import offmap
from offmap.errors import OffmapError
from offmap.kmod import build, loaded
from offmap.kmod.source import copy_sources, source_folder, source_hash

ROOT = Path(offmap.__file__).parents[2]


def test_hash_changes_with_the_sources_and_with_nothing_else(tmp_path: Path) -> None:
    copy_sources(source_folder(), tmp_path)
    assert source_hash(tmp_path) == source_hash(source_folder())
    (tmp_path / "main.o").write_bytes(b"x")
    assert source_hash(tmp_path) == source_hash(source_folder())
    (tmp_path / "main.c").write_text("int x;")
    assert source_hash(tmp_path) != source_hash(source_folder())


def test_wheels_hold_all_sources() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    packaged = {Path(path).name for path in wheel["force-include"] if path.startswith("kernel/module/")}
    there = {path.name for path in source_folder().iterdir() if path.suffix in {".c", ".h", ".conf"}}
    assert packaged == there | {"Kbuild", "Makefile"}


def test_versions_agree() -> None:
    assert f'MODULE_VERSION("{offmap.__version__}")' in (source_folder() / "main.c").read_text()
    assert f'PACKAGE_VERSION="{offmap.__version__}"' in (source_folder() / "dkms.conf").read_text()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give an empty cache folder."""
    monkeypatch.setenv("OFFMAP_CACHE", str(tmp_path))
    return tmp_path


def test_missing_headers(cache: Path) -> None:
    with pytest.raises(OffmapError, match=r"headers of kernel 9\.9\.9-x are not installed.*linux-headers-9\.9\.9-x"):
        build.build("9.9.9-x")


def test_headers_of_a_kernel_of_ones_own(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(OffmapError, match=f"the headers of kernel 9.9.9-x are not installed \\({tmp_path}/own/build "):
        build.build("9.9.9-x", modules=tmp_path / "own")


def test_a_kernel_that_was_made_again_is_another(tmp_path: Path) -> None:
    module, config = tmp_path / "offmap.ko", tmp_path / "include/config/auto.conf"
    config.parent.mkdir(parents=True)
    for path in (module, config):
        path.touch()
    os.utime(module, (100, 100))
    os.utime(config, (99, 99))
    assert not build._is_older(module, tmp_path)
    os.utime(config, (101, 101))
    assert build._is_older(module, tmp_path)
    assert not build._is_older(module, tmp_path / "none")


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("/bin/sh: 1: x86_64-linux-gnu-gcc-12: not found\nmake[1]: *** [x] Error 127", "apt-get install gcc-12"),
        ("make[3]: gcc-14: No such file or directory", "apt-get install gcc-14"),
        ("/bin/sh: 1: awk: not found\nmake: *** Error 127", "awk is needed"),
        ("main.c:1:2: error: no such thing\nmake: *** Error 2", "main.c:1:2: error: no such thing"),
        ("", "did not say why"),
    ],
)
def test_failures_of_make(output: str, expected: str) -> None:
    error = str(build.why_make_failed("6.12", output))
    assert expected in error
    assert "\n" not in error


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give an unsigned file, for a kernel that has no module loaded."""
    monkeypatch.setattr(loaded, "SYSFS", tmp_path / "none")
    path = tmp_path / "offmap.ko"
    path.write_bytes(b"\x7fELF")
    return path


def test_locked_down_kernels_say_so(module: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(loaded, "LOCKDOWN", tmp_path / "lockdown")
    monkeypatch.setattr(loaded, "SIG_ENFORCE", tmp_path / "sig_enforce")
    (tmp_path / "lockdown").write_text("none [integrity] confidentiality\n")
    with pytest.raises(OffmapError, match=r"locked down \(Secure Boot.*is not signed.*mokutil"):
        loaded.load(module)
    (tmp_path / "lockdown").write_text("[none] integrity confidentiality\n")
    (tmp_path / "sig_enforce").write_text("Y\n")
    with pytest.raises(OffmapError, match=r"signed modules only.*is not signed"):
        loaded.load(module)


def test_only_root_loads(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(OffmapError, match="only root"):
        loaded.load(module)


def test_unload_of_nothing(module: Path) -> None:
    with pytest.raises(OffmapError, match="not loaded"):
        loaded.unload()
