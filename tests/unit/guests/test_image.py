"""Images on disk: found by folder or name, and refused where they are not whole."""

import json
from pathlib import Path

import pytest

from offmap.errors import OffmapError
from offmap.guests import build as module
from offmap.guests.build import build_image
from offmap.guests.image import Image, find_image, named_image
from offmap.guests.recipe import RootRecipe
from offmap.lab.errors import LabError
from offmap.lab.kernel import HostKernel


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OFFMAP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HostKernel:
    """A root file system and an initrd that are none, and a kernel."""
    root = tmp_path / "root"
    root.mkdir()
    with (root / "root.img").open("wb") as file:
        file.write(b"ext4")
        file.truncate(8 << 20)
    (root / "packages").write_text("base-files 12.4\nudev 252\n")
    monkeypatch.setattr(module, "cached_root", lambda _: root)
    monkeypatch.setattr(module, "guest_initrd", lambda _: b"initrd")
    vmlinuz = tmp_path / "vmlinuz-6.12"
    vmlinuz.write_bytes(b"kernel")
    return HostKernel("debian:6.12", "6.12.117", vmlinuz, tmp_path)


def test_an_image_is_found_by_its_name_and_by_its_folder(parts: HostKernel, tmp_path: Path) -> None:
    recipe = RootRecipe(include=("curl",))
    built = build_image(recipe, parts, named_image("mine"))
    assert find_image("mine") == built
    assert find_image(str(built.folder)) == built
    assert (built.kernel.read_bytes(), built.initrd.read_bytes()) == (b"kernel", b"initrd")
    assert built.root.read_bytes()[:4] == b"ext4"
    assert built.root.stat().st_size == 8 << 20
    assert built.root.stat().st_blocks * 512 < 1 << 20, "the holes were filled"
    assert built.facts["packages"] == {"base-files": "12.4", "udev": "252"}
    assert (built.facts["release"], built.facts["include"]) == ("bookworm", ["curl"])
    assert built.facts["kernel_release"] == "6.12.117"
    # In place of an older one, and not in place of anything else.
    assert build_image(RootRecipe(), parts, built.folder).facts["include"] == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    with pytest.raises(LabError, match="is there and is no image"):
        build_image(recipe, parts, tmp_path / "full")
    assert (tmp_path / "full" / "precious").exists()


def test_what_is_no_image_is_refused_with_what_to_do(parts: HostKernel, tmp_path: Path) -> None:
    with pytest.raises(OffmapError, match="there is no image debian; make one: offmap image build,"):
        find_image("debian")
    with pytest.raises(OffmapError, match="offmap image build --name other"):
        find_image("other")
    with pytest.raises(OffmapError, match="is no name for an image"):
        find_image(".hidden")
    with pytest.raises(OffmapError, match="there is no image in"):
        find_image(str(tmp_path / "nowhere"))
    folder = build_image(RootRecipe(), parts, tmp_path / "x").folder
    (folder / "initrd.img").unlink()
    with pytest.raises(OffmapError, match=r"has no readable initrd\.img"):
        Image.load(folder)
    (folder / "image.json").write_text(json.dumps({"schema": "offmap-image/0"}))
    with pytest.raises(OffmapError, match="of another kind"):
        Image.load(folder)
    (folder / "image.json").write_text("{")
    with pytest.raises(OffmapError, match="cannot read the image"):
        Image.load(folder)
