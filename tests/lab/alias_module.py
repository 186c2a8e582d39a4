"""The test modules (tests/modules), for a disposable host: one plants kernel mappings, one reads kernel memory."""

from pathlib import Path

from offmap.kmod.build import built_module
from offmap.kmod.lab_build import build_in_root
from offmap.kmod.source import source_hash
from offmap.lab.cache import locked
from offmap.lab.kernel import HostKernel

__all__ = ["alias_module", "peek_module"]

SOURCES = Path(__file__).parents[1] / "modules"


def alias_module(kernel: HostKernel) -> Path:
    """Build the module of /dev/offmap-alias for a Debian kernel, unless that has been done; give its path."""
    return _built(kernel, "alias")


def peek_module(kernel: HostKernel) -> Path:
    """The same for /dev/offmap-peek."""
    return _built(kernel, "peek")


def _built(kernel: HostKernel, name: str) -> Path:
    sources = SOURCES / name
    folder = built_module(kernel.release).parent.parent / f"{kernel.release}-{name}-{source_hash(sources)}"
    module = folder / f"offmap_{name}.ko"
    folder.mkdir(exist_ok=True)
    with locked(folder.with_name(f"{folder.name}.lock")):
        if not module.is_file():
            build_in_root(kernel, module, sources)
    return module
