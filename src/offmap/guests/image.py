"""An image: a folder with a guest's kernel, initrd and root file system, and a list of its contents.

A guest changes nothing in its image: its root is the image, read-only, below a layer in the guest's own RAM. So several
guests can run from one image at once, and what a guest writes is as hidden as the rest of its RAM.
"""

import json
import os
import re
from pathlib import Path
from typing import NamedTuple, Self

from offmap.boot.linux import BootSource
from offmap.devices.virtio.device import DeviceSpec
from offmap.devices.virtio.drive import DriveSpec
from offmap.errors import OffmapError

SCHEMA = "offmap-image/1"
DEFAULT_NAME = "debian"
DESCRIPTION = "image.json"
ROOT = "root.img"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Image(NamedTuple):
    """The files that a guest boots from.

    Attributes:
        folder: where it is.
        facts: what its image.json says.
    """

    folder: Path
    facts: dict[str, object]

    @property
    def kernel(self) -> Path:
        return self.folder / "vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.folder / "initrd.img"

    @property
    def root(self) -> Path:
        """The root file system: raw ext4, no partitions."""
        return self.folder / ROOT

    def boot(
        self, command_line: str, *, writable: bool = False, attended: bool = True
    ) -> tuple[BootSource, tuple[str, DeviceSpec]]:
        """What a guest of this image boots, and the drive that must be its first.

        Args:
            command_line: of its kernel, to which the image adds where its root is.
            writable: what the guest writes goes into the image, and not into a layer in its own RAM.
            attended: somebody looks at its console; else a panic ends it.
        """
        root = "root=/dev/vda rw" if writable else "root=/dev/vda offmap.overlay=tmpfs"
        if not attended:
            root += " panic=-1"
        source = BootSource(self.kernel, self.initrd, f"{root} {command_line}".strip())
        return source, ("root", DriveSpec(self.root, readonly=not writable))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the image in `folder`. Raises OffmapError if there is none, or if another version of offmap made it."""
        try:
            facts = json.loads((folder / DESCRIPTION).read_text())
        except FileNotFoundError:
            raise OffmapError(f"there is no image in {folder}", "make one: offmap image build") from None
        except (OSError, ValueError, RecursionError) as error:
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
    """The folder of the cache for an image of this name. Raises OffmapError if the name is invalid."""
    if not _NAME.fullmatch(name):
        raise OffmapError(f"{name!r} is no name for an image", "use letters, digits, and -._, or give a folder")
    from offmap.lab.cache import cache_folder  # not at each start of a guest, as its own imports take long

    return cache_folder("images", "named") / name


def find_image(text: str) -> Image:
    """Find an image. `text` is a folder if it has a slash or is an image; else it is a name in the cache.

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
