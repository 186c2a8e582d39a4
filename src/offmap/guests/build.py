"""Make an image: put its parts into one folder."""

import json
import subprocess
from dataclasses import asdict
from pathlib import Path

from offmap import __version__
from offmap.guests.image import DESCRIPTION, ROOT, SCHEMA, Image
from offmap.guests.initrd import guest_initrd
from offmap.guests.recipe import RootRecipe
from offmap.guests.rootfs import IMAGE, PACKAGE_LIST, cached_root
from offmap.lab.cache import locked, replace_folder, scratch_folder
from offmap.lab.errors import LabError
from offmap.lab.kernel import HostKernel


def build_image(recipe: RootRecipe, kernel: HostKernel, folder: Path) -> Image:
    """Make the image in `folder`. If the folder is an image already, it is replaced in one step.

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
            _copy(root / IMAGE, new / ROOT)
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
    """Copy a file. Share its blocks if the file system can, and keep its holes."""
    command = ["cp", "--reflink=auto", "--sparse=always", "--", str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LabError(done.stderr.strip() or f"cp failed with status {done.returncode}", "check the disk")
