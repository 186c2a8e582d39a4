"""The module for a disposable host."""

from pathlib import Path

from offmap.kmod.build import build, built_module
from offmap.kmod.buildroot import build_in_root
from offmap.kmod.modinfo import release_of
from offmap.lab.cache import locked
from offmap.lab.errors import LabError
from offmap.lab.kernel import HostKernel


def lab_module(kernel: HostKernel) -> Path:
    """Build offmap.ko for a kernel that a lab host runs, unless that has been done; give its path.

    For a Debian kernel the headers are downloaded, with the compiler that they need; for any other, they must be here:
    what ``build`` in its modules' folder leads to (``make modules_install`` puts it there).

    Raises:
        LabError: there is no way to the headers of this kernel.
        OffmapError: it does not build.
    """
    module = built_module(kernel.release)
    if not kernel.name.startswith("debian:"):
        return _of_ones_own(kernel, module)
    if module.is_file() and release_of(module) == kernel.release:
        return module
    module.parent.mkdir(exist_ok=True)
    with locked(module.parent.with_name(f"{module.parent.name}.lock")):
        if not module.is_file():
            build_in_root(kernel, module)
    if release_of(module) != kernel.release:
        raise LabError(f"{module} was built for another kernel than {kernel.release}", f"remove {module.parent}")
    return module


def _of_ones_own(kernel: HostKernel, module: Path) -> Path:
    has_headers = (kernel.modules / "build/Makefile").is_file()
    if not has_headers and module.is_file() and release_of(module) == kernel.release:
        return module  # of a Debian kernel, which was given as a file
    return build(kernel.release, modules=kernel.modules if has_headers else None)
