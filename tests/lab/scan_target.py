"""Secrets in a disposable host, planted one kind after another, then the audit that has to find and name them all.

``scan_target.py FOLDER ARGUMENTS…`` prints two lines of JSON: what was planted where, and what
``offmap audit PID --range … --scan file:SECRET --json ARGUMENTS…`` printed; it ends with that status. FOLDER: on tmpfs.
The audited "guest" is a memory of this process, of pages that are no neighbours in RAM, with the secret once within a
page and once across two.
"""

import ctypes
import json
import mmap
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

from offmap.audit.btf import Btf
from offmap.audit.guest_pages import GuestPages
from offmap.audit.kcore import Kcore
from offmap.audit.kernel_objects import KernelObjects
from offmap.audit.oracle import translate
from offmap.audit.pagemap import own_entries, pfn
from offmap.audit.placed import Placer
from offmap.audit.regions import Layout
from offmap.audit.roots import walk_kcore

PAGE = 4096
GUEST_PAGES = 64
WITHIN = 5 * PAGE + 1234  # offset in the guest
SYS_ADD_KEY = 248  # asm/unistd_64.h
KEY_SPEC_PROCESS_KEYRING = -2  # linux/keyctl.h
FILE_OFFSET = 3 * PAGE + 77
FREED = 192 << 20  # what the audit itself takes of it must leave some
SPARSE = 64  # pages

libc = ctypes.CDLL(None, use_errno=True)


def plant_guest(secret: bytes) -> tuple[mmap.mmap, int]:
    """Memory whose pages are taken in a mixed order, so that neighbours are none in RAM; where two have the secret."""
    memory = mmap.mmap(-1, GUEST_PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    for index in range(GUEST_PAGES):
        memory[(index * 37 % GUEST_PAGES) * PAGE] = 1
    frames = pfn(own_entries(ctypes.addressof(ctypes.c_char.from_buffer(memory)), GUEST_PAGES)).tolist()
    second = next(page for page in range(33, GUEST_PAGES) if abs(frames[page] - frames[page - 1]) > 1)
    across = second * PAGE - 40
    memory[WITHIN : WITHIN + len(secret)] = secret
    memory[across : across + len(secret)] = secret
    return memory, across


def plant_own(secret: bytes) -> mmap.mmap:
    """Memory of this process beside the guest; within a page, as across two a scan looks only in files and guests."""
    memory = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(secret)
    return memory


def plant_file(path: Path, secret: bytes) -> None:
    path.write_bytes(bytes(FILE_OFFSET) + secret + bytes(PAGE))


def plant_key(secret: bytes) -> None:
    """A key's payload is in kmalloc'ed memory."""
    serial = libc.syscall(SYS_ADD_KEY, b"user", b"offmap-test", secret, len(secret), KEY_SPEC_PROCESS_KEYRING)
    if serial < 0:
        raise OSError(ctypes.get_errno(), "add_key")


def start_other(secret: bytes) -> "subprocess.Popen[bytes]":
    """Another process that holds it, in memory of its own; it lives until its standard input is closed."""
    script = "import mmap, sys; kept = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS); "
    script += "kept.write(sys.stdin.buffer.read(int(sys.argv[1]))); print('ready', flush=True); sys.stdin.buffer.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(len(secret))], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdin is not None and other.stdout is not None
    other.stdin.write(secret)
    other.stdin.flush()
    other.stdout.readline()
    return other


def plant_freed(secret: bytes) -> None:
    """A process that ends: its pages go back to the allocator as they are (init_on_free is off)."""
    child = os.fork()
    if child == 0:
        memory = mmap.mmap(-1, FREED, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for index in range(FREED // PAGE):
            position = index * PAGE + 9
            memory[position : position + len(secret)] = secret if index % SPARSE == 0 else bytes(len(secret))
        os._exit(0)
    os.waitpid(child, 0)


def own_stack() -> Any:
    """What the scan would say of a page of this thread's kernel stack; nobody can plant a secret there at will."""
    with Kcore() as kcore:
        layout = Layout.of(kcore.vmcoreinfo, kcore.page_offset_base, kcore.segments)
        tasks = KernelObjects(kcore, layout, Btf.of_host()).tasks()
        stack = next(task.stack for task in tasks if task.pid == os.getpid())
        mappings = walk_kcore(kcore)
        placer = Placer(kcore, layout, mappings, GuestPages.none())
        pa = translate(mappings, stack)
        assert pa is not None
        return placer.owners(placer.look([pa // PAGE]))[pa // PAGE].to_json()


def main() -> int:
    folder, arguments = Path(sys.argv[1]), sys.argv[2:]
    secret = secrets.token_bytes(100)
    source = folder / "secret"
    source.write_bytes(secret)
    plant_freed(secret)
    guest, across = plant_guest(secret)
    va = ctypes.addressof(ctypes.c_char.from_buffer(guest))
    own = plant_own(secret)
    on_tmpfs, on_disk = folder / "copy on tmpfs", Path("/var/tmp/offmap-scan-test")
    plant_file(on_tmpfs, secret)
    plant_file(on_disk, secret)
    plant_key(secret)
    pipe = os.pipe()
    os.write(pipe[1], secret)
    other = start_other(secret)
    try:
        planted = {
            "pid": os.getpid(),
            "other": other.pid,
            "guest": f"{va:#x}",
            "within": f"{va + WITHIN:#x}",
            "across": f"{va + across:#x}",
            "file_offset": FILE_OFFSET,
            "tmpfs": str(on_tmpfs),
            "disk": str(on_disk),
            "source": str(source),
            "stack": own_stack(),
        }
        print(json.dumps(planted), flush=True)
        command = [sys.executable, "-m", "offmap.cli.main", "audit", str(os.getpid()), "--json"]
        command += ["--range", f"{va:#x}:{GUEST_PAGES * PAGE}", "--scan", f"file:{source}", *arguments]
        return subprocess.run(command, check=False).returncode
    finally:
        other.kill()
        other.wait()
        on_disk.unlink()
        own.close()


if __name__ == "__main__":
    sys.exit(main())
