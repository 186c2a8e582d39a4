"""An image: a folder with what a guest boots from (kernel, initrd, root file system), and what is in it.

A guest of an image changes nothing in it: its root is the image, read-only, below a layer in the guest's own RAM. So
several guests can run from one image at once, and what a guest writes is as hidden as the rest of its RAM.
"""

import json
import os
import re
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from offmap import __version__
from offmap.errors import OffmapError
from offmap.guests.initrd import guest_initrd
from offmap.guests.recipe import RootRecipe
from offmap.guests.rootfs import IMAGE, PACKAGE_LIST, cached_root
from offmap.lab.cache import cache_folder, locked, replace_folder, scratch_folder
from offmap.lab.errors import LabError
from offmap.lab.kernel import HostKernel

__all__ = ["DEFAULT_NAME", "Image", "build_image", "find_image", "named_image"]

SCHEMA = "offmap-image/1"
DEFAULT_NAME = "debian"
DESCRIPTION = "image.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class Image:
    """What a guest boots from.

    Attributes:
        folder: where it is.
        facts: what its image.json says.
    """

    folder: Path
    facts: dict[str, Any]

    @property
    def kernel(self) -> Path:
        return self.folder / "vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.folder / "initrd.img"

    @property
    def root(self) -> Path:
        """The root file system: raw ext4, no partitions."""
        return self.folder / IMAGE

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Look at the image in `folder`.

        Raises:
            OffmapError: there is none, or one that a different offmap made.
        """
        try:
            facts = json.loads((folder / DESCRIPTION).read_text())
        except FileNotFoundError:
            raise OffmapError(f"there is no image in {folder}", "make one: offmap image build") from None
        except (OSError, ValueError) as error:
            raise OffmapError(
                f"cannot read the image in {folder}: {error}", "make it again: offmap image build"
            ) from None
        if not isinstance(facts, dict) or facts.get("schema") != SCHEMA:
            raise OffmapError(f"the image in {folder} is of another kind than {SCHEMA}", "make it again")
        image = cls(folder, facts)
        for path in (image.kernel, image.initrd, image.root):
            if not os.access(path, os.R_OK):
                raise OffmapError(f"the image in {folder} has no readable {path.name}", "make it again")
        return image


def named_image(name: str) -> Path:
    """Where the cache keeps the image of this name.

    Raises:
        OffmapError: it is no name.
    """
    if not _NAME.fullmatch(name):
        raise OffmapError(f"{name!r} is no name for an image", "use letters, digits, and -._, or give a folder")
    return cache_folder("images", "named") / name


def find_image(text: str) -> Image:
    """The image that a user means: the folder, if it is one or has a slash; else one of the cache, by its name.

    Raises:
        OffmapError: there is none.
    """
    folder = Path(text)
    if "/" not in text and not (folder / DESCRIPTION).is_file():
        folder = named_image(text)
        if not folder.is_dir():
            name = "" if text == DEFAULT_NAME else f" --name {text}"
            raise OffmapError(f"there is no image {text}", f"make one: offmap image build{name}, or give its folder")
    return Image.load(folder)


def build_image(recipe: RootRecipe, kernel: HostKernel, folder: Path) -> Image:
    """Make the image in `folder`, which is replaced at once if it is an image.

    Raises:
        LabError: a part of it cannot be made, or the folder holds something else.
    """
    root = cached_root(recipe)
    folder = folder.absolute()
    if folder.exists() and not (folder / DESCRIPTION).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise LabError(f"{folder} is there and is no image", "give another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f".{folder.name}.lock")), scratch_folder(folder) as scratch:
            new = scratch / "new"
            new.mkdir()
            _copy(root / IMAGE, new / IMAGE)
            (new / "vmlinuz").write_bytes(kernel.vmlinuz.read_bytes())
            (new / "initrd.img").write_bytes(guest_initrd(kernel))
            facts = {
                "schema": SCHEMA,
                "offmap": __version__,
                "distribution": "debian",
                **asdict(recipe),
                "kernel": kernel.name,
                "kernel_release": kernel.release,
                "packages": dict(line.split(" ", 1) for line in (root / PACKAGE_LIST).read_text().splitlines()),
            }
            (new / DESCRIPTION).write_text(json.dumps(facts, indent=2) + "\n")
            replace_folder(new, folder)
    except OSError as error:
        raise LabError(
            f"cannot make an image in {folder}: {error.strerror}", "check the disk and its rights"
        ) from error
    return Image.load(folder)


def _copy(source: Path, target: Path) -> None:
    """Sharing the blocks where the file system can, and without those that are holes in `source`."""
    command = ["cp", "--reflink=auto", "--sparse=always", "--", str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LabError(done.stderr.strip() or f"cp failed with status {done.returncode}", "check the disk")
