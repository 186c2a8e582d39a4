"""The host as its kernel describes it: which kernel, which boot, which modules.

Nothing here is proof. A kernel that lies can lie in each of these files; docs/evidence.md says what follows.
"""

import platform
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from offmap.audit.evidence.statement import Host, Ima, Moment
from offmap.audit.host import utc_now
from offmap.errors import KernelError
from offmap.report.typed import plain
from offmap.uapi.elf import ELF64_NHDR, Elf64_Nhdr

_NT_GNU_BUILD_ID = 3  # linux/elfnote.h users: scripts/module.lds.S, the linker's --build-id
_GNU = b"GNU"


def host(sys: Path = Path("/sys"), proc: Path = Path("/proc")) -> Host:
    """Describe this host. Raises KernelError: it does not tell what evidence cannot do without."""
    ima, measurements = _ima(sys / "kernel/security")
    return Host(
        name=plain(platform.node()),
        kernel=plain(platform.release()),
        kernel_build_id=_build_id_of(sys / "kernel/notes"),
        boot_id=_needed(proc / "sys/kernel/random/boot_id"),
        command_line=plain(_needed(proc / "cmdline")),
        taint=int(_needed(proc / "sys/kernel/tainted")),
        lockdown=_lockdown(_optional(sys / "kernel/security/lockdown")),
        modules=loaded_modules(sys, proc),
        livepatches=tuple(sorted(plain(name) for name in _names(sys / "kernel/livepatch"))),
        ima=ima.value,
        ima_measurements=measurements,
    )


def moment() -> Moment:
    """Now."""
    return Moment(utc_now(), time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000)


def loaded_modules(sys: Path, proc: Path) -> dict[str, str | None]:
    """Build ID of each loaded module.

    /proc/modules and /sys/module are both asked: a module that is missing from one of them is still listed. A kernel
    that takes no modules (CONFIG_MODULES) has no list of them.
    """
    names = {line.split(" ", 1)[0] for line in (_optional(proc / "modules") or "").splitlines()}
    # Parts of the kernel image are in /sys/module too, but without a state.
    names |= {name for name in _names(sys / "module") if (sys / "module" / name / "initstate").exists()}
    return {plain(name): _module_build_id(sys / "module" / name / "notes") for name in sorted(names)}


def build_id(notes: bytes) -> str | None:
    """The build ID among these ELF notes, in hexadecimal; None if there is none."""
    return next((value.hex() for name, kind, value in _notes(notes) if (name, kind) == (_GNU, _NT_GNU_BUILD_ID)), None)


def _notes(data: bytes) -> Iterator[tuple[bytes, int, bytes]]:
    """Name, type and value of each note."""
    at = 0
    while at + ELF64_NHDR.size <= len(data):
        header = Elf64_Nhdr._make(ELF64_NHDR.unpack_from(data, at))
        name_at = at + ELF64_NHDR.size
        value_at = name_at + (header.n_namesz + 3 & ~3)
        end = value_at + header.n_descsz
        if end > len(data):
            return
        yield data[name_at : name_at + header.n_namesz].rstrip(b"\0"), header.n_type, data[value_at:end]
        at = end + 3 & ~3


def _build_id_of(path: Path) -> str | None:
    try:
        return build_id(path.read_bytes())
    except OSError:
        return None


def _module_build_id(folder: Path) -> str | None:
    return next((found for name in sorted(_names(folder)) if (found := _build_id_of(folder / name))), None)


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:
        return []


def _needed(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        raise KernelError(f"reading {path}", error, "evidence needs it; mount procfs") from None


def _optional(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _lockdown(text: str | None) -> str | None:
    """``none [integrity] confidentiality``: the level in force stands in brackets."""
    found = [word[1:-1] for word in (text or "").split() if word.startswith("[") and word.endswith("]")]
    return found[0] if found else None


def _ima(securityfs: Path) -> tuple[Ima, int | None]:
    """What IMA does, and how much it has measured. Its first entry (boot_aggregate) needs no policy."""
    count = None
    with suppress(OSError, ValueError):
        count = int((securityfs / "ima/runtime_measurements_count").read_text())
    if count is not None:
        return Ima.MEASURES if count > 1 else Ima.BOOT_ONLY, count
    # An empty folder is no securityfs: then nothing is known.
    return Ima.ABSENT if _names(securityfs) and not (securityfs / "ima").exists() else Ima.UNKNOWN, None
