"""Can root on the host read guest RAM through the VMM's process, as tools and attackers do?"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence

from offmap.audit.canary import CANARY_LENGTH, PREFIX, CanaryKey, parse_canary
from offmap.audit.guest_ram import RamRange
from offmap.compare.probes.live_guest import LiveGuest
from offmap.compare.probes.survey import no, undetermined, yes
from offmap.compare.questions import Answer
from offmap.errors import KernelError
from offmap.patience import scaled

_PTRACE_PEEKDATA = 2  # linux/ptrace.h, as the two below
_PTRACE_ATTACH = 16
_PTRACE_DETACH = 17
_WALL = 0x40000000  # linux/wait.h
_PIECE = 4 << 20
_GDB_SECONDS = 40.0

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.process_vm_readv.restype = ctypes.c_ssize_t

Read = Callable[[int, int], bytes]
"""(address in the VMM, number of bytes) -> the bytes there, or fewer."""


class _iovec(ctypes.Structure):
    _fields_ = [("iov_base", ctypes.c_void_p), ("iov_len", ctypes.c_size_t)]


def _secrets(
    read: Read, ranges: Sequence[RamRange], key: CanaryKey, *, one: bool = False
) -> tuple[list[int], int, OSError | None]:
    """Addresses of valid canaries in the VMM, bytes that were read, and the first error.

    Args:
        one: stop at the first canary (each page that is read this way maps /dev/mem anew).
    """
    places: set[int] = set()
    numbers: set[int] = set()
    total, first_error = 0, None
    for part in ranges:
        for at in range(part.va, part.va + part.bytes, _PIECE):
            if one and places:
                break
            try:
                data = read(at, min(_PIECE + CANARY_LENGTH, part.va + part.bytes - at))
            except OSError as error:
                first_error = first_error or error
                continue
            total += min(len(data), _PIECE)
            hit = data.find(PREFIX)
            while hit >= 0:
                if canary := parse_canary(data[hit : hit + CANARY_LENGTH], key):
                    if canary.number not in numbers:
                        places.add(at + hit)
                    numbers.add(canary.number)
                hit = data.find(PREFIX, hit + 1)
    return sorted(places), total, first_error


def _answer(id: str, call: str, found: Sequence[int], total: int, error: OSError | None) -> Answer:
    if found:
        return yes(id, f"{len(found)} secrets of the guest read by {call}, of {total >> 20} MiB")
    if error is not None:
        text = str(KernelError(call, error))
        return no(id, text, f"{total >> 20} MiB could be read" if total else "none of it could be read")
    return undetermined(id, f"{call} read {total >> 20} MiB of guest RAM, and none of its secrets")


def process_vm_readv(guest: LiveGuest, ranges: Sequence[RamRange], key: CanaryKey) -> Answer:
    """Search all of the VMM's guest RAM by process_vm_readv(2)."""
    guest.check_alive()
    room = ctypes.create_string_buffer(_PIECE + CANARY_LENGTH)
    pid = guest.pid

    def read(address: int, size: int) -> bytes:
        local, remote = _iovec(ctypes.addressof(room), size), _iovec(address, size)
        done = _libc.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
        if done < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return room.raw[:done]

    return _answer("breaks.process_vm_readv", "process_vm_readv", *_secrets(read, ranges, key))


def ptrace(guest: LiveGuest, ranges: Sequence[RamRange], key: CanaryKey) -> Answer:
    """Attach to the VMM, find a secret in it, and read one word of the secret by PTRACE_PEEKDATA."""
    id, pid = "breaks.ptrace", guest.pid
    guest.check_alive()
    _ptrace(_PTRACE_ATTACH, pid, 0)
    try:
        os.waitpid(pid, _WALL)
        fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            # /proc/PID/mem runs the same code as PEEKDATA (access_remote_vm), but reads more than a word.
            found, total, error = _secrets(lambda at, size: os.pread(fd, size, at), ranges, key, one=True)
        finally:
            os.close(fd)
        address = found[0] if found else ranges[0].va
        try:
            word = _ptrace(_PTRACE_PEEKDATA, pid, address)
        except OSError as refused:
            return _answer(id, "PTRACE_PEEKDATA", (), total, error or refused)
    finally:
        _ptrace(_PTRACE_DETACH, pid, 0)
    if not found:
        return undetermined(id, "PTRACE_PEEKDATA read a word of guest RAM, and /proc/PID/mem found no secret in it")
    if (word & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little") != PREFIX[:8]:
        return undetermined(id, "PTRACE_PEEKDATA read something else than /proc/PID/mem")
    if not guest.is_alive():
        return yes(id, reason="but the guest did not live through it")
    return yes(id, "a word of a secret fetched, which /proc/PID/mem had found")


def _ptrace(request: int, pid: int, address: int) -> int:
    ctypes.set_errno(0)
    result: int = _libc.ptrace(request, pid, ctypes.c_void_p(address), None)
    if result == -1 and (number := ctypes.get_errno()):
        raise OSError(number, os.strerror(number))
    return result


def gdb_attach(guest: LiveGuest, ranges: Sequence[RamRange]) -> Answer:
    """Attach gdb to the VMM, look at a word of guest RAM, and detach."""
    id = "breaks.gdb_attach"
    gdb = shutil.which("gdb")
    if gdb is None:
        return undetermined(id, "not measured: there is no gdb")
    guest.check_alive()
    # Without the VMM's symbols: they are not needed, and take longest to load.
    argv = [gdb, "-nx", "-nh", "-batch", "-iex", "set auto-load no", "-iex", "set auto-solib-add off"]
    argv += ["-p", str(guest.pid), "-ex", f"x/1gx {ranges[0].va:#x}", "-ex", "detach"]
    environment = {**os.environ, "DEBUGINFOD_URLS": ""}
    limit = scaled(_GDB_SECONDS)
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=limit, check=False,
            env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return undetermined(id, f"not measured: gdb took longer than {limit:.0f} s")
    attached = "Detaching from" in done.stdout or "detached" in done.stdout
    said = (done.stderr.strip().splitlines() or [""])[-1]
    if not attached:
        return no(id, f"gdb did not attach: {said or f'status {done.returncode}'}", done.stdout[-1000:])
    if not guest.is_alive():
        return no(id, "the guest did not live through it", done.stdout[-1000:])
    if "Cannot access memory" in done.stderr:
        return yes(id, "attached and detached; the guest goes on; its RAM cannot be accessed from gdb")
    return yes(id, "attached and detached; the guest goes on; a word of its RAM could be read")
