"""Building for a kernel against its headers: the module, and an object that says what its structures are like."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from offmap.errors import OffmapError
from offmap.kmod.modinfo import release_of
from offmap.kmod.source import MODULE, copy_sources, source_folder, source_hash, types_folder
from offmap.lab.cache import cache_folder, locked, scratch_folder
from offmap.log import Logger

_log = Logger("offmap.kmod")

_INSTALLED = Path("/lib/modules")
_COMPILER = re.compile(r"((?:[\w+.-]+-)?(?:gcc|clang|cc)(?:-[\d.]+)?): (?:not found|No such file|command not found)")
_TOOL = re.compile(r"\b(\w+): (?:not found|No such file|command not found)")


def built_module(release: str) -> Path:
    """The path of the module for kernel `release`, built from these sources; it may not exist yet."""
    return cache_folder("modules") / f"{release}-{source_hash(source_folder())}" / f"{MODULE}.ko"


def build(release: str | None = None, *, again: bool = False, modules: Path | None = None) -> Path:
    """Build the module for kernel `release` (default: the running one), unless that has been done.

    Args:
        release: as ``uname -r`` says it.
        again: build it even so. A kernel that was configured or compiled again since counts as another.
        modules: its ``lib/modules/RELEASE`` folder, if not where kernels are installed.

    Raises:
        OffmapError: with what is missing, and how to get it.
    """
    release = release or os.uname().release
    module = built_module(release)
    headers = (modules or _INSTALLED / release) / "build"
    with locked(module.parent.with_name(f"{module.parent.name}.lock")):
        if again or not module.is_file() or _is_older(module, headers):
            _make(release, headers, module, source_folder())
    made_for = release_of(module)
    if made_for != release:
        raise OffmapError(
            f"the headers in {headers} are of kernel {made_for}",
            "install those of the running kernel, or boot the kernel that they are of",
        )
    return module


def build_types(release: str, modules: Path) -> Path:
    """An object with the BTF of those structures that an attack reads, unless that has been built.

    Args:
        modules: the kernel's ``lib/modules/RELEASE`` folder.

    Raises:
        OffmapError: with what is missing.
    """
    made = cache_folder("modules") / f"{release}-types-{source_hash(types_folder())}" / "offmap_types.o"
    headers = modules / "build"
    with locked(made.parent.with_name(f"{made.parent.name}.lock")):
        if not made.is_file() or _is_older(made, headers):
            _make(release, headers, made, types_folder(), made.name)
    return made


def _is_older(module: Path, headers: Path) -> bool:
    """Whether the kernel was rebuilt since: its configuration or its exported symbols differ."""
    made = module.stat().st_mtime
    files = (headers / "include/config/auto.conf", headers / "Module.symvers")
    return any(file.is_file() and file.stat().st_mtime > made for file in files)


def _make(release: str, headers: Path, made: Path, sources: Path, target: str = "modules") -> None:
    if not (headers / "Makefile").is_file():
        raise OffmapError(
            f"the headers of kernel {release} are not installed ({headers} is missing)",
            f"run: apt-get install linux-headers-{release} (Fedora: dnf install kernel-devel-{release})",
        )
    if shutil.which("make") is None:
        raise OffmapError("there is no make to build the module with", "run: apt-get install make gcc")
    made.parent.mkdir(exist_ok=True)
    with scratch_folder(made.parent) as scratch:
        copy_sources(sources, scratch)
        command = ["make", "-C", str(headers), f"M={scratch}", target]
        _log.debug("%s", " ".join(command))
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "LC_ALL": "C"},
        )
        if done.returncode != 0:
            raise why_make_failed(release, done.stdout + done.stderr)
        (scratch / made.name).replace(made)


def why_make_failed(release: str, output: str) -> OffmapError:
    """The error in make's output: a missing compiler or tool, or else the first error line."""
    if missing := _COMPILER.search(output):
        compiler = missing[1].removeprefix("x86_64-linux-gnu-")
        return OffmapError(
            f"the compiler that kernel {release} was built with is not installed ({missing[1]})",
            f"run: apt-get install {compiler}",
        )
    if missing := _TOOL.search(output):
        return OffmapError(f"{missing[1]} is needed to build the module and is not installed", "install it")
    lines = [line.strip() for line in output.splitlines() if re.search(r"error|\*\*\*", line, re.IGNORECASE)]
    return OffmapError(
        f"the module does not build for kernel {release}: {lines[0] if lines else 'make failed and did not say why'}",
        "offmap supports kernels from 6.1 to 7.3; report others",
    )
