"""The module in the running kernel: load it, read its state, unload it."""

import ctypes
import errno
import os
from dataclasses import dataclass
from pathlib import Path

from offmap.errors import KernelError, OffmapError
from offmap.files import text_of
from offmap.kmod.modinfo import is_signed, modinfo
from offmap.kmod.source import MODULE
from offmap.units import format_size

SYSFS = Path("/sys/module") / MODULE
HOLDERS = Path("/sys/class/misc") / MODULE / "holders"
LOCKDOWN = Path("/sys/kernel/security/lockdown")
SIG_ENFORCE = Path("/sys/module/module/parameters/sig_enforce")

# arch/x86/entry/syscalls/syscall_64.tbl
_SYS_DELETE_MODULE = 176
_SYS_FINIT_MODULE = 313

_SIGN = "sign it with a key that this kernel trusts (mokutil --import, scripts/sign-file), or boot without Secure Boot"
_LOAD_REMEDY = {
    errno.EPERM: "run as root, on a kernel that still takes modules (kernel.modules_disabled=0)",
    errno.ENOKEY: _SIGN,
    errno.EKEYREJECTED: _SIGN,
    errno.ENOEXEC: "build it for this kernel: offmap module build --again",
    errno.EOPNOTSUPP: "turn the host's memory encryption off (mem_encrypt=off), or use another backend",
}


@dataclass(frozen=True)
class LoadedModule:
    """The loaded module, as /sys/module describes it."""

    version: str
    srcversion: str


@dataclass(frozen=True)
class Holder:
    """A process that opened /dev/offmap, and the bytes that its file holds of one source."""

    pid: int
    source: str
    size: int
    command: str


def loaded_module() -> LoadedModule | None:
    """The loaded module; None if there is none."""
    if not SYSFS.is_dir():
        return None
    return LoadedModule(*(text_of(SYSFS / name).strip() for name in ("version", "srcversion")))


def holders() -> list[Holder]:
    """The processes that hold memory. Raises OffmapError if this user may not know."""
    try:
        lines = HOLDERS.read_text().splitlines()
    except OSError as error:
        raise OffmapError(f"cannot read {HOLDERS}: {error.strerror}", "run as root") from None
    found = []
    for line in lines:
        pid, source, size, command = line.split(" ", 3)
        found.append(Holder(int(pid), source, int(size), command))
    return found


def load(module: Path) -> None:
    """Load the module from a file.

    Raises:
        OffmapError: it is loaded, or this kernel does not take it, with the reason.
    """
    there = loaded_module()
    if there is not None:
        if there.srcversion == modinfo(module).get("srcversion"):
            return
        raise OffmapError("another build of the module is loaded", "unload that first: offmap module unload")
    if os.geteuid() != 0:
        raise OffmapError("only root may load kernel modules", "run it with sudo")
    if not is_signed(module) and (reason := _signature_needed()):
        raise OffmapError(f"{reason}, and {module} is not signed", _SIGN)
    libc = ctypes.CDLL(None, use_errno=True)
    with module.open("rb") as file:
        if libc.syscall(_SYS_FINIT_MODULE, file.fileno(), b"", 0) == 0:
            return
        error = ctypes.get_errno()
    raise KernelError(f"loading {module}", error, _LOAD_REMEDY.get(error, "see the kernel's log: dmesg"))


def _signature_needed() -> str:
    """Why this kernel takes signed modules only; empty if it takes others too, or does not say."""
    lockdown = text_of(LOCKDOWN)
    if "[integrity]" in lockdown or "[confidentiality]" in lockdown:
        return "the kernel is locked down (Secure Boot, or lockdown= on its command line)"
    if text_of(SIG_ENFORCE).strip() == "Y":
        return "the kernel takes signed modules only (module.sig_enforce)"
    return ""


def unload() -> None:
    """Unload the module. Raises OffmapError if it is not loaded, or if its memory is in use."""
    if loaded_module() is None:
        raise OffmapError("the module is not loaded")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_SYS_DELETE_MODULE, MODULE.encode(), os.O_NONBLOCK) == 0:
        return
    error = ctypes.get_errno()
    if error in (errno.EAGAIN, errno.EBUSY):
        users = ", ".join(f"{h.command} ({h.pid}): {format_size(h.size)}" for h in holders())
        raise OffmapError(f"the module is in use by {users or 'an open /dev/offmap'}", "end that first")
    raise KernelError("unloading the module", error, "run as root" if error == errno.EPERM else "")
