"""The test module that plants kernel mappings (tests/modules/alias), for a disposable host."""

from pathlib import Path

from offmap.kmod.build import built_module
from offmap.kmod.lab_build import build_in_root
from offmap.kmod.source import source_hash
from offmap.lab.cache import locked
from offmap.lab.kernel import HostKernel

__all__ = ["alias_module"]

SOURCES = Path(__file__).parents[1] / "modules/alias"


def alias_module(kernel: HostKernel) -> Path:
    """Build it for a Debian kernel, unless that has been done; give its path."""
    folder = built_module(kernel.release).parent.parent / f"{kernel.release}-alias-{source_hash(SOURCES)}"
    module = folder / "offmap_alias.ko"
    folder.mkdir(exist_ok=True)
    with locked(folder.with_name(f"{folder.name}.lock")):
        if not module.is_file():
            build_in_root(kernel, module, SOURCES)
    return module
