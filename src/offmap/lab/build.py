"""Building a patched kernel for disposable hosts: Debian's source, offmap's patches, a small configuration.

About seven minutes on two processors; afterwards it is in the cache, by what it was made from. It runs nowhere but in
the lab and is never installed.
"""

import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from offmap.lab.cache import cache_folder, locked, replace_folder, scratch_folder
from offmap.lab.errors import LabError
from offmap.lab.installed import find_program, search_path
from offmap.lab.kernel import HostKernel, image_release
from offmap.lab.kernel_tree import damaged, used_files, write_manifest
from offmap.lab.series import PatchSeries, missing_options, patch_series
from offmap.lab.source import KernelSource, kernel_source

# What the kernel's makefiles run, and the Debian package of each (Documentation/process/changes.rst).
TOOLS = {
    "make": "make",
    "gcc": "gcc",
    "ld": "binutils",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "patch": "patch",
    "perl": "perl",
    "xz": "xz-utils",
    "depmod": "kmod",
}
# objtool is linked against libelf, and everything against a C library.
HEADERS = {"gelf.h": "libelf-dev", "stdlib.h": "libc6-dev"}

Say = Callable[[str], None]


def patched_kernel(spec: str, say: Say = lambda _: None) -> HostKernel:
    """Return the kernel that `spec` (``patched:7.3``) names, building it unless that has been done.

    Args:
        say: takes a line for the user at each step that takes long.

    Raises:
        LabError: there are no such patches, something to build it with is missing, or it does not build.
    """
    series = patch_series(spec)
    source = kernel_source(series.name)
    store = _store(series, source)
    with locked(store.with_name(f"{store.name}.lock")):
        tree = store / "tree"
        if damaged(tree):
            try:
                _build(series, source, store, say)
            except OSError as error:
                raise LabError(f"cannot build {spec} in {store}: {error}", "check the disk and its rights") from error
        image = next((tree / "boot").glob("vmlinuz-*"))
    release = image_release(image)
    return HostKernel(spec, release, image, tree / "lib/modules" / release)


def built_tree(series: PatchSeries) -> Path | None:
    """The built kernel's folder; None if it was built from other sources, or not at all. Never downloads the source."""
    for store in cache_folder("kernels").glob(f"patched-{series.name}-*/version"):
        version = store.read_text().strip()
        if store.parent.name.endswith(series.key(version)) and not damaged(store.parent / "tree"):
            return store.parent / "tree"
    return None


def _store(series: PatchSeries, source: KernelSource) -> Path:
    return cache_folder("kernels") / f"patched-{series.name}-{series.key(source.version)}"


def missing_packages(
    which: Callable[[str], str | None] = shutil.which, include: Sequence[Path] = (Path("/usr/include"),)
) -> list[str]:
    """The Debian packages of what a build needs and this machine lacks."""
    lacking = [package for tool, package in TOOLS.items() if which(tool) is None]
    for header, package in HEADERS.items():
        if not any((folder / header).is_file() for folder in include):
            lacking.append(package)
    return lacking


def _build(series: PatchSeries, source: KernelSource, store: Path, say: Say) -> None:
    if lacking := missing_packages(find_program):
        raise LabError(
            f"cannot build {series.spec}: this machine lacks {', '.join(lacking)}",
            f"run: apt-get install {' '.join(lacking)}",
        )
    store.mkdir(exist_ok=True)
    for leftover in store.glob(".*"):  # of a run that was killed; we hold the lock
        shutil.rmtree(leftover, ignore_errors=True)
    sweep(store.parent)
    (store / "version").write_text(f"{source.version}\n")
    log = store / "build.log"
    with scratch_folder(store / "work") as work:
        tree, new = work / "source", work / "new"
        tree.mkdir()
        say(f"unpacking Linux {source.version}")
        source.unpack(tree)
        apply_patches(tree, series.patches, say)
        compile_kernel(tree, series, series.key(source.version), new, log, say)
        replace_folder(new, store / "tree")


def sweep(kernels: Path) -> None:
    """Remove what other builds left behind that were killed: a gigabyte each, of patches that have changed since."""
    for leftover in kernels.glob("patched-*/.*"):
        store = leftover.parent
        with store.with_name(f"{store.name}.lock").open("a") as lock, suppress(BlockingIOError):
            # A build in progress holds its lock; so do we ours, by another description of the file than this one.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(leftover, ignore_errors=True)


def apply_patches(tree: Path, patches: Sequence[Path], say: Say = lambda _: None) -> None:
    """Apply `patches` to the source `tree`, in order, each without fuzz.

    Raises:
        LabError: one of them does not apply.
    """
    for patch in patches:
        say(f"applying {patch.name}")
        done = subprocess.run(
            ["patch", "-p1", "--batch", "--forward", "--fuzz=0", "--directory", str(tree), "--input", str(patch)],
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode != 0:
            failed = [line for line in done.stdout.splitlines() if "FAILED" in line or "can't find" in line]
            reason = (failed or done.stderr.strip().splitlines() or [f"status {done.returncode}"])[0]
            raise LabError(
                f"{patch.name} does not apply to this source: {reason}",
                "the source has changed since the patches were made: bring them up to date",
            )


def compile_kernel(tree: Path, series: PatchSeries, key: str, new: Path, log: Path, say: Say) -> None:
    """Configure and compile the source `tree`; lay the result out in `new` as a Debian kernel would be.

    Args:
        key: becomes part of the release, so that a running kernel says what it was made from.
        log: gets all that make says.

    Raises:
        LabError: Kconfig dropped an option, or make failed.
    """
    objects = new.with_name("objects")
    objects.mkdir()
    make = [
        *("make", "-C", str(tree), f"O={objects}", f"LOCALVERSION=-offmap-{key[:8]}", f"INSTALL_MOD_PATH={new}"),
        # Nothing of this machine, and nothing that changes from one build to the next.
        *("KBUILD_BUILD_USER=offmap", "KBUILD_BUILD_HOST=lab", "KBUILD_BUILD_TIMESTAMP=Thu Jan 1 00:00:00 UTC 1970"),
    ]
    log.write_bytes(b"")
    say("configuring")
    wanted = new.with_name("wanted.config")
    wanted.write_text("".join(path.read_text() for path in series.configs()))
    run_make([*make, "allnoconfig", f"KCONFIG_ALLCONFIG={wanted}"], log)
    if dropped := missing_options(wanted.read_text(), (objects / ".config").read_text()):
        raise LabError(
            f"this kernel does not have what {series.configs()[-1].name} asks for: {' '.join(dropped)}",
            "name the options that these depend on, or leave them out",
        )
    say(f"compiling with {os.cpu_count() or 1} processors; this takes minutes, once (log: {log})")
    run_make([*make, f"-j{os.cpu_count() or 1}", "bzImage", "modules"], log)
    run_make([*make, "modules_install"], log)
    image = objects / "arch/x86/boot/bzImage"
    release = image_release(image)
    modules = new / "lib/modules" / release
    for link in ("build", "source"):
        (modules / link).unlink(missing_ok=True)
    # What a distribution's headers package holds (scripts/package/install-extmod-build): offmap.ko is built against it.
    install = tree / "scripts/package/install-extmod-build"
    run_make([*make, "run-command", f"KBUILD_RUN_COMMAND={install} {modules / 'build'}"], log)
    (new / "boot").mkdir()
    for name, path in (("vmlinuz", image), ("config", objects / ".config"), ("System.map", objects / "System.map")):
        path.rename(new / "boot" / f"{name}-{release}")
    write_manifest(new, used_files(new, release))


def run_make(command: list[str], log: Path, what: str = "the kernel") -> None:
    """Run a make of the kernel's source, and append what it says to `log`.

    Raises:
        LabError: it failed; says that `what` does not build, and why.
    """
    # A make that runs us (make test-all) hands down flags and a job server that are not for this one.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    with log.open("ab") as output:
        done = subprocess.run(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            check=False,
            env={**env, "PATH": search_path(), "LC_ALL": "C"},
        )
    if done.returncode != 0:
        raise LabError(
            f"{what} does not build: {first_complaint(log.read_text(errors='replace'))}", f"the log is {log}"
        )


def first_complaint(output: str) -> str:
    """The line of make's output that tells what went wrong."""
    for pattern in (r"\berror: |fatal error|: not found|undefined reference", r"\*\*\*", r"(?i)error"):
        for line in output.splitlines():
            if re.search(pattern, line):
                return line.strip()
    return "make failed and did not say why"
