"""The TCG plugin that logs the accesses of a disposable host's kernel to RAM (qemu/access-log.c): compiled, kept."""

import hashlib
import shutil
import subprocess
from pathlib import Path

from offmap.lab.cache import cache_folder, locked, replace_folder, scratch_folder
from offmap.lab.errors import LabError
from offmap.lab.installed import shipped
from offmap.lab.kernel_tree import damaged, write_manifest
from offmap.lab.qemu_header import HEADER, qemu_header
from offmap.uapi.page import PAGE_SHIFT

SOURCE = "access-log.c"
_FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wno-parentheses", "-fPIC", "-shared", "-fvisibility=hidden")


def plugin_source() -> Path:
    """Return the path of the plugin's source. Raises LabError: this installation has none."""
    return shipped("qemu", "_qemu", SOURCE) / SOURCE


def access_plugin() -> Path:
    """Return the plugin for the installed QEMU, compiling it unless that has been done (a second).

    Raises:
        LabError: there is no compiler or no header of this QEMU, or it does not compile.
    """
    source, header = plugin_source(), qemu_header()
    digest = hashlib.sha256()
    for data in (source.read_bytes(), (header.folder / HEADER).read_bytes(), header.version.encode()):
        digest.update(f"{len(data)}\n".encode() + data)
    store = cache_folder("plugins") / digest.hexdigest()[:16]
    plugin = store / "access-log.so"
    with locked(store.with_name(f"{store.name}.lock")):
        if damaged(store):
            _compile(source, header.folder, store)
    return plugin


def plugin_argument(log: Path, memory: int) -> str:
    """Return what QEMU's ``-plugin`` takes to log accesses to `memory` bytes of RAM in `log`, which is made anew.

    Raises:
        LabError: the plugin cannot be made, or the log not be written.
    """
    plugin, log = access_plugin(), log.absolute()
    try:
        log.write_bytes(b"")
    except OSError as error:
        raise LabError(f"cannot write the access log {log}: {error.strerror}", "name another file") from error
    words = (str(plugin), f"log={log}", f"frames={memory >> PAGE_SHIFT}")
    return ",".join(word.replace(",", ",,") for word in words)


def _compile(source: Path, include: Path, store: Path) -> None:
    if shutil.which("gcc") is None:
        raise LabError("cannot compile the QEMU plugin: this machine has no gcc", "run: apt-get install gcc libc6-dev")
    with scratch_folder(store) as scratch:
        new = scratch / "new"
        new.mkdir()
        plugin = new / "access-log.so"
        done = subprocess.run(
            ["gcc", *_FLAGS, "-I", str(include), "-o", str(plugin), str(source)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            reason = (errors or [f"status {done.returncode}"])[0]
            raise LabError(f"the QEMU plugin does not compile: {reason}", "see that libc6-dev is installed")
        write_manifest(new, [plugin])
        replace_folder(new, store)
