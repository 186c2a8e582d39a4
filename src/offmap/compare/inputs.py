"""What the result of a cell depends on, as digests. If one differs, an earlier result is not used again."""

import hashlib
from pathlib import Path

import offmap
from offmap.compare.kinds import Vmm, kind_of
from offmap.compare.spec import NATIVE, CellSpec
from offmap.errors import KernelError
from offmap.kmod.build import built_module
from offmap.kmod.loaded import loaded_module
from offmap.kmod.source import source_folder, source_hash
from offmap.lab.cache import sha256_of
from offmap.lab.kernel import HostKernel

_DIGITS = 16
_NO_PART = (
    *("report/", "compare/report/", "cli/compare"),
    *("compare/run.py", "compare/scheduler.py", "compare/store.py", "compare/cluster.py"),
)
"""Parts of the package that measure nothing: they show or schedule."""

_NAMES = {
    "code": "the code",
    "host_kernel": "the host kernel",
    "host_release": "the host kernel",
    "guest_kernel": "the guest kernel",
    "guest_release": "the guest kernel",
    "module": "what the offmap module needs",
    "firecracker": "Firecracker",
}

_RUNNING = ("version", "cmdline")


def code_digest() -> str:
    """The digest of the code that measures: offmap's and its kernel module's, as it is on the disk now.

    Raises:
        OffmapError: this installation has no sources of the module.
    """
    package = Path(offmap.__file__).parent
    digest = hashlib.sha256(source_hash(source_folder()).encode())
    for path in sorted(package.rglob("*")):
        name = str(path.relative_to(package))
        if "__pycache__" in path.parts or name.startswith(_NO_PART) or not path.is_file():
            continue
        data = path.read_bytes()
        digest.update(f"\n{name} {len(data)}\n".encode() + data)
    return digest.hexdigest()[:_DIGITS]


def kernel_digest(kernel: HostKernel) -> str:
    """The digest of a kernel's image. For a kernel that somebody built, also of its modules, by size and time."""
    if kernel.name == NATIVE:  # its image may be anywhere; what it refuses depends on its command line too
        return hashlib.sha256(b"".join(Path(f"/proc/{name}").read_bytes() for name in _RUNNING)).hexdigest()[:_DIGITS]
    if kernel.name.startswith("patched:"):
        return kernel.release  # it contains a digest of its sources and configuration
    digest = hashlib.sha256(sha256_of(kernel.vmlinuz).encode())
    if not kernel.name.startswith("debian:"):
        for path in sorted(kernel.modules.rglob("*.ko*")):
            status = path.stat()
            digest.update(f"\n{path.relative_to(kernel.modules)} {status.st_size} {int(status.st_mtime)}".encode())
    return digest.hexdigest()[:_DIGITS]


def module_state(kernel: HostKernel) -> str:
    """Whether a host with that kernel can have the offmap module. If this changes, a refusal is measured again."""
    if kernel.name == NATIVE:
        loaded = loaded_module()
        return loaded.srcversion if loaded else "not loaded"
    if kernel.name.startswith("debian:"):
        return "built"
    headers = (kernel.modules / "build/Makefile", Path("/lib/modules") / kernel.release / "build/Makefile")
    there = any(path.is_file() for path in headers) or built_module(kernel.release).is_file()
    return "built" if there else "no headers"


def module_input(spec: CellSpec, host: HostKernel) -> dict[str, str]:
    """What this cell depends on in addition to `inputs_of`."""
    return {"module": module_state(host)} if kind_of(spec.backend).backend.needs_module else {}


def firecracker_input(spec: CellSpec, firecracker: Path | None) -> dict[str, str]:
    """What this cell depends on if it runs the user's own Firecracker. The released one stands in the code.

    Raises:
        OffmapError: it cannot be read.
    """
    if firecracker is None or kind_of(spec.backend).vmm is not Vmm.FIRECRACKER:
        return {}
    try:
        return {"firecracker": sha256_of(firecracker)[:_DIGITS]}
    except OSError as error:
        raise KernelError(f"reading {firecracker}", error, "name the program with --firecracker PATH") from None


def inputs_of(host: HostKernel, guest: HostKernel) -> dict[str, str]:
    """What every cell with these kernels depends on (CellResult.inputs)."""
    return {
        "code": code_digest(),
        "host_kernel": kernel_digest(host),
        "host_release": host.release,
        "guest_kernel": kernel_digest(guest),
        "guest_release": guest.release,
    }


def difference(then: dict[str, str], now: dict[str, str]) -> str:
    """What has changed, in words (``the code and the host kernel``); empty if nothing."""
    changed = dict.fromkeys(_NAMES[name] for name in _NAMES if then.get(name) != now.get(name))
    return " and ".join(changed)
