"""Kernel modules by name: which files, in which order, and their uncompressed content.

Reads what depmod wrote (modules.dep, modules.builtin; see modules.dep(5)). A module that is part of the kernel image
needs no file.
"""

import lzma
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from offmap.lab.errors import LabError

_SUFFIXES = (".ko", ".ko.xz", ".ko.zst", ".ko.gz")


def _name(path: str) -> str | None:
    """``kernel/arch/x86/kvm/kvm-amd.ko.xz`` -> ``kvm_amd`` (the kernel takes - and _ for the same)."""
    file = path.rsplit("/", 1)[-1]
    for suffix in _SUFFIXES:
        if file.endswith(suffix):
            return file.removesuffix(suffix).replace("-", "_")
    return None


class ModuleIndex:
    """The modules of one kernel.

    Args:
        dependencies: text of modules.dep.
        builtin: text of modules.builtin.
    """

    def __init__(self, dependencies: str, builtin: str = "") -> None:
        self._path: dict[str, str] = {}
        self._needs: dict[str, list[str]] = {}
        for line in dependencies.splitlines():
            path, _, needed = line.partition(":")
            if name := _name(path.strip()):
                self._path[name] = path.strip()
                self._needs[name] = [need for item in needed.split() if (need := _name(item))]
        self._builtin = {name for line in builtin.splitlines() if (name := _name(line.strip()))}

    @classmethod
    def of(cls, modules: Path) -> "ModuleIndex":
        """Read the index in a ``lib/modules/RELEASE`` folder; a kernel without one has all it needs built in."""
        texts = [
            path.read_text() if path.is_file() else ""
            for path in (modules / "modules.dep", modules / "modules.builtin")
        ]
        return cls(*texts)

    def __contains__(self, name: str) -> bool:
        key = name.replace("-", "_")
        return key in self._path or key in self._builtin

    def __bool__(self) -> bool:
        return bool(self._path or self._builtin)

    def load_order(self, names: Iterable[str]) -> list[str]:
        """Return the files to load for ``names``, dependencies first, each once, relative to the modules folder.

        Raises:
            LabError: a module is neither there nor built in, or the index contradicts itself.
        """
        order: list[str] = []
        state: dict[str, bool] = {}  # False while its dependencies are being visited

        def visit(name: str) -> None:
            if name in self._builtin or state.get(name):
                return
            if name not in self._path:
                raise LabError(
                    f"the kernel has no module {name}",
                    "use a kernel with 9p, overlayfs and KVM (Debian's generic one has them)",
                )
            if name in state:
                raise LabError(f"modules.dep has a loop at {name}", "run depmod on the modules folder")
            state[name] = False
            # depmod lists all dependencies, the deepest last: this order satisfies insmod even so.
            for need in reversed(self._needs[name]):
                visit(need)
            state[name] = True
            order.append(self._path[name])

        for name in names:
            visit(name.replace("-", "_"))
        return order


def load_module(path: Path, tools: Mapping[str, str] | None = None) -> bytes:
    """Return a module's uncompressed content.

    Args:
        path: a .ko, .ko.xz, .ko.gz or .ko.zst file.
        tools: replaces the lookup of ``zstd`` (for tests).

    Raises:
        LabError: it cannot be read or decompressed.
    """
    try:
        data = path.read_bytes()
        if path.suffix == ".xz":
            return lzma.decompress(data)
        if path.suffix == ".gz":
            import gzip

            return gzip.decompress(data)
        if path.suffix == ".zst":
            return _zstd(data, path, tools)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise LabError(f"cannot read the module {path}: {error}") from error
    return data


def _zstd(data: bytes, path: Path, tools: Mapping[str, str] | None) -> bytes:
    tool = tools.get("zstd") if tools is not None else shutil.which("zstd")
    if not tool:
        raise LabError(f"cannot decompress {path}: no zstd command", "install zstd")
    done = subprocess.run([tool, "-dc"], input=data, capture_output=True, check=False)
    if done.returncode != 0:
        raise LabError(f"cannot decompress {path}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout
