"""The test modules (tests/modules), for a disposable host.

One plants kernel mappings, one reads kernel memory, one takes calls out of the kernel.
"""

import subprocess
from pathlib import Path

from offmap.kmod.build import built_module
from offmap.kmod.lab_build import build_in_root
from offmap.kmod.source import copy_sources, source_hash
from offmap.lab.cache import locked, scratch_folder
from offmap.lab.kernel import HostKernel

__all__ = ["alias_module", "peek_module", "skip_module"]

SOURCES = Path(__file__).parents[1] / "modules"


def alias_module(kernel: HostKernel) -> Path:
    """Build the module of /dev/offmap-alias for a Debian kernel, unless that has been done; give its path."""
    return _built(kernel, "alias")


def peek_module(kernel: HostKernel) -> Path:
    """The same for /dev/offmap-peek."""
    return _built(kernel, "peek")


def skip_module(kernel: HostKernel) -> Path:
    """The same for offmap_skip.ko and a patched kernel."""
    return _built(kernel, "skip")


def _built(kernel: HostKernel, name: str) -> Path:
    sources = SOURCES / name
    folder = built_module(kernel.release).parent.parent / f"{kernel.release}-{name}-{source_hash(sources)}"
    module = folder / f"offmap_{name}.ko"
    folder.mkdir(exist_ok=True)
    with locked(folder.with_name(f"{folder.name}.lock")):
        if not module.is_file():
            if kernel.name.startswith("debian:"):
                build_in_root(kernel, module, sources)
            else:
                with scratch_folder(folder) as scratch:
                    copy_sources(sources, scratch)
                    make = ["make", "-C", str(kernel.modules / "build"), f"M={scratch}", "modules"]
                    subprocess.run(make, check=True, capture_output=True)
                    (scratch / module.name).replace(module)
    return module
