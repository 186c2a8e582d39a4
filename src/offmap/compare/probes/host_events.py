"""Events of the host while the guest runs: reclaim, compaction, memory pressure, hibernation, kexec."""

import ctypes
import errno
import mmap
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

from offmap.compare.probes.guest_program import ProbeError
from offmap.compare.probes.host_kernel import meminfo, write_knob
from offmap.compare.probes.live_guest import LiveGuest
from offmap.compare.probes.survey import no, undetermined, yes
from offmap.compare.questions import Answer
from offmap.errors import KernelError, OffmapError
from offmap.uapi.mman import MADV_POPULATE_WRITE

PATTERN = 8 << 20
"""Bytes of guest memory that are checked for changes."""

_RECLAIMED = 2048  # pages that the host must reclaim
_STEP = 4 << 20
_SYS_kexec_file_load = 320  # arch/x86/entry/syscalls/syscall_64.tbl
_KEXEC_FILE_UNLOAD, _KEXEC_FILE_NO_INITRAMFS = 1, 4  # linux/kexec.h
_DISK = Path("/sys/power/disk")
_STATE = Path("/sys/power/state")


def outlives(guest: LiveGuest, id: str, act: Callable[[], str]) -> Answer:
    """Whether the guest goes on after an event of the host, with its memory unchanged.

    Args:
        act: causes the event, and returns what it did, in words.
    """
    guest.check_alive()
    detail = act()
    try:
        wrong, words = guest.command("check")[0]
    except ProbeError as error:
        return no(id, f"the guest did not live through it: {error}", detail)
    if int(wrong) or not int(words):
        return no(id, f"{wrong} of {words} words of guest memory are not what they were", detail)
    return yes(id, f"{detail}; {int(words) * 8 >> 20} MiB of guest memory as they were")


def drop_caches() -> str:
    write_knob("/proc/sys/vm/drop_caches", "3")
    return "echo 3 >/proc/sys/vm/drop_caches"


def compaction() -> str:
    before = _vmstat("compact_migrate_scanned")
    write_knob("/proc/sys/vm/compact_memory", "1")
    return f"echo 1 >/proc/sys/vm/compact_memory; {_vmstat('compact_migrate_scanned') - before} pages scanned"


def memory_pressure() -> str:
    """Let a process take memory until the host reclaims some. Return what happened, in words.

    If nothing is left to reclaim, the kernel kills that process: it is the OOM killer's first choice.
    """
    started, before = meminfo()["MemAvailable"], _reclaimed()
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        _take_memory(send, before)
    os.close(send)
    try:
        held = os.read(receive, 1) != b""  # it has what it wants, or is dead
        left = meminfo()["MemAvailable"]
    finally:
        os.close(receive)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    reclaimed = _reclaimed() - before
    if not held and not os.WIFSIGNALED(status):
        raise OffmapError("a process that was to take the host's memory could not")
    if not held:
        return f"MemAvailable was {started} KiB; the kernel killed who took it all; {reclaimed} pages reclaimed"
    return f"MemAvailable went from {started} KiB to {left}; {reclaimed} pages reclaimed"


def _reclaimed() -> int:
    return _vmstat("pgsteal_direct") + _vmstat("pgsteal_kswapd")


def _take_memory(send: int, reclaimed_before: int) -> None:
    """Take memory until the host has reclaimed some, then wait to be killed. Never returns."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
        taken = []
        while _reclaimed() < reclaimed_before + _RECLAIMED:
            piece = mmap.mmap(-1, _STEP, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            piece.madvise(MADV_POPULATE_WRITE)
            taken.append(piece)
        os.write(send, b".")
        signal.pause()
    finally:
        os._exit(1)


def _vmstat(name: str) -> int:
    text = Path("/proc/vmstat").read_text()
    return sum(int(value) for value in re.findall(rf"^{name}\S* (\d+)$", text, re.MULTILINE))


def hibernation_offered() -> tuple[bool | None, str]:
    """Whether the kernel says that it can hibernate now (None if it never can), and its words."""
    try:
        state, disk = _STATE.read_text().split(), _DISK.read_text().strip()
    except OSError as error:
        return None, f"this kernel has no hibernation ({error.filename}: {error.strerror})"
    said = f"/sys/power/state: {' '.join(state) or 'nothing'}; /sys/power/disk: {disk}"
    return "disk" in state and "[disabled]" not in disk, said


def hibernation(without_guest: tuple[bool | None, str]) -> Answer:
    """Whether the host can hibernate while the guest runs.

    Args:
        without_guest: what `hibernation_offered` returned before the guest started.
    """
    id = "breaks.hibernation"
    before, said_before = without_guest
    now, said = hibernation_offered()
    if before is None or now is None:
        return undetermined(id, said)
    if not before:
        return undetermined(id, "this host could not hibernate without the guest either", said_before)
    detail = f"{said}; not carried out"
    if now:
        return yes(id, detail)
    return no(id, "the kernel does not hibernate while there is secret memory", detail)


def kexec(kernel: Path) -> Answer:
    """Load a kernel, and unload it."""
    id = "breaks.kexec"
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(kernel, os.O_RDONLY | os.O_CLOEXEC)
    try:
        command_line = b"console=ttyS0\0"
        # As longs: ctypes would pass ints of 32 bits.
        arguments = [ctypes.c_long(value) for value in (fd, -1, len(command_line))]
        flags = ctypes.c_long(_KEXEC_FILE_NO_INITRAMFS)
        if libc.syscall(_SYS_kexec_file_load, *arguments, ctypes.c_char_p(command_line), flags) != 0:
            error = KernelError("kexec_file_load", ctypes.get_errno())
            return undetermined(id, str(error)) if error.errno == errno.ENOSYS else no(id, str(error))
    finally:
        os.close(fd)
    nothing = [ctypes.c_long(-1), ctypes.c_long(-1), ctypes.c_long(0), ctypes.c_char_p(None)]
    libc.syscall(_SYS_kexec_file_load, *nothing, ctypes.c_long(_KEXEC_FILE_UNLOAD))
    return yes(id, f"{kernel.name} loaded and unloaded; not started")
