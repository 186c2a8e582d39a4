"""A Debian root file system as an ext4 image, made from the machine's own mirror without installing anything.

mmdebstrap makes a tar archive of it (apt verifies every package by the mirror's signed index), and mke2fs an image of
that, so that nothing is mounted. Done once for each recipe: the cache keeps the image.
"""

import os
import subprocess
import uuid
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from offmap.guests.recipe import PACKAGES, RootRecipe
from offmap.lab import apt
from offmap.lab.cache import cache_folder, locked, replace_folder, scratch_folder
from offmap.lab.errors import LabError
from offmap.lab.installed import find_program, search_path

IMAGE = "root.img"
PACKAGE_LIST = "packages"  # one "name version" a line

# As apt and the README of mmdebstrap have it; what a licence asks to be kept is kept.
_SMALLER = (
    "path-exclude=/usr/share/doc/*",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/lintian/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-include=/usr/share/locale/locale.alias",
)
_NO_UPDATES = frozenset({"sid", "unstable", "experimental"})  # suites without a security archive


def cached_root(recipe: RootRecipe) -> Path:
    """The folder in the cache that holds IMAGE and PACKAGE_LIST for `recipe`; made if it is not there (15 s).

    Raises:
        LabError: a program is missing, the mirror cannot be had, or knows no such package.
    """
    store = cache_folder("images", "roots") / recipe.key
    with locked(store.with_name(f"{store.name}.lock")):
        if not (store / IMAGE).is_file():
            with scratch_folder(store) as scratch:
                try:
                    (scratch / "new").mkdir()
                    _make(recipe, scratch)
                    replace_folder(scratch / "new", store)
                except OSError as error:
                    raise LabError(
                        f"cannot store an image in {store.parent}: {error.strerror}", "check the disk and its rights"
                    ) from error
    return store


def _make(recipe: RootRecipe, scratch: Path) -> None:
    """Make scratch/new/IMAGE and scratch/new/PACKAGE_LIST."""
    bootstrap, customize = _bootstrap_command(recipe), _customize_command(recipe, scratch)
    sources = _sources(recipe.release)
    environment = {**os.environ, "PATH": search_path(), "LC_ALL": "C"}
    with (
        (scratch / "mmdebstrap.log").open("w+b") as log,
        subprocess.Popen(
            bootstrap, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment
        ) as first,
    ):
        second = subprocess.Popen(
            customize, stdin=first.stdout, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
        )
        try:
            if first.stdin is not None and first.stdout is not None:
                first.stdout.close()  # it is the second's
                first.stdin.write(sources.encode())
                first.stdin.close()
            _, errors = second.communicate()
        except BaseException:
            first.terminate()
            second.terminate()
            second.wait()
            raise
        if first.wait() != 0:
            log.seek(0)
            raise LabError(
                f"mmdebstrap failed: {_why(log.read(), first.returncode)}",
                "check the network and the names of the packages",
            )
        if second.returncode != 0:
            raise LabError(
                f"cannot make an image of the root file system: {_why(errors, second.returncode)}",
                "if it does not fit, give a larger --size; check the disk of the cache",
            )


def _program(name: str, package: str) -> str:
    found = find_program(name)
    if found is None:
        raise LabError(f"no {name} command, which an image is made with", f"install {package}")
    return found


def _sources(release: str) -> str:
    if not apt.have_apt():
        raise LabError("cannot make a Debian image: this machine has no apt-get", "make it on a Debian machine")
    suites = [release, *([] if release in _NO_UPDATES else [f"{release}-security"])]
    sources = apt.debian_sources(suites)
    if not sources:
        raise LabError("this machine's apt sources name no mirror of Debian", "add one to /etc/apt/sources.list")
    return sources


def _bootstrap_command(recipe: RootRecipe) -> list[str]:
    """mmdebstrap, with its sources.list on standard input and a tar archive on standard output."""
    mode = "root" if os.geteuid() == 0 else "unshare"
    command = [_program("mmdebstrap", "mmdebstrap"), f"--mode={mode}", "--variant=minbase", "--format=tar"]
    command += [f"--include={','.join((*PACKAGES, *recipe.include))}"]
    command += ["--aptopt=Apt::Install-Recommends false", *(f"--dpkgopt={line}" for line in _SMALLER)]
    return [*command, recipe.release, "-", "-"]


def _customize_command(recipe: RootRecipe, scratch: Path) -> Sequence[str]:
    _program("mke2fs", "e2fsprogs")
    script = files("offmap.guests").joinpath("customize.sh").read_text()
    name = uuid.uuid5(uuid.NAMESPACE_OID, recipe.key)  # the same recipe has the same
    image, packages = scratch / "new" / IMAGE, scratch / "new" / PACKAGE_LIST
    size = f"{recipe.size >> 20}M"
    words = [str(image), size, str(packages), str(scratch), str(name), recipe.hostname, str(int(recipe.autologin))]
    shell = ["sh", "-c", script, "sh", *words]
    if os.geteuid() == 0:
        return shell
    # The archive has many owners: in a namespace of this user's subordinate ids they can all be written.
    return [_program("unshare", "util-linux"), "--map-auto", "--map-root-user", *shell]


def _why(output: bytes, status: int) -> str:
    lines = [line for line in output.decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("E:")]
    return (errors or lines or [f"status {status}"])[-1].removeprefix("E: ")
