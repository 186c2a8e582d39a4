"""A process to audit, run in a disposable host: memory with canaries in it, then the audit of itself as a child.

``audit_target.py KIND KEY MIB ARGUMENTS…`` prints what ``offmap audit PID ARGUMENTS…`` prints and ends with its status.
A canary is put together in the memory itself and nowhere else, so that no copy of it stands in this process's heap.
"""

import ctypes
import fcntl
import hashlib
import json
import mmap
import os
import resource
import secrets
import subprocess
import sys

from offmap.audit.canary import PREFIX

PAGE = 4096
CANARIES = 64
RESERVED = 0x6000_0000  # the host is booted with memmap=256M$0x60000000
SYS_MEMFD_SECRET = 447
KVM_CREATE_VM = 0xAE01  # _IO(KVMIO, 0x01), linux/kvm.h

libc = ctypes.CDLL(None, use_errno=True)


def address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def shared(kind: str, size: int) -> int:
    """A file of memory."""
    if kind == "secretmem":
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        fd = libc.syscall(SYS_MEMFD_SECRET, 0)
        if fd < 0:
            raise OSError(ctypes.get_errno(), "memfd_secret")
    else:
        fd = os.memfd_create("ram", os.MFD_CLOEXEC | (os.MFD_HUGETLB if kind == "hugetlb" else 0))
    os.ftruncate(fd, size)
    return int(fd)


def plant(memory: mmap.mmap, key: str, size: int, canaries: int) -> None:
    for number in range(canaries):
        nonce = secrets.token_hex(16)
        position = number * (size // canaries) + 16 * (number % 200)  # anywhere in its page, but not across two
        for part in (
            PREFIX,
            b"%04x" % number,
            b":" + nonce.encode(),
            b":" + hashlib.sha256(f"{key}:{number:04x}:{nonce}".encode()).hexdigest().encode(),
        ):
            memory[position : position + len(part)] = part
            position += len(part)


def main() -> int:
    kind, _, where = sys.argv[1].partition("-")
    key, size, arguments = sys.argv[2], int(sys.argv[3]) << 20, sys.argv[4:]
    if kind == "anon":
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    elif kind == "reserved":
        memory = mmap.mmap(os.open("/dev/mem", os.O_RDWR), size, offset=RESERVED)
    else:
        fd = shared(kind, size)
        memory = mmap.mmap(fd, size)
    if kind not in {"memfd", "hugetlb"}:
        for position in range(0, size, PAGE):
            memory[position] = 1
    plant(memory, key, size, size // PAGE if where == "full" else CANARIES)
    # "-elsewhere": the claim names a second mapping, in which no page was ever touched.
    claimed = mmap.mmap(fd, size) if where == "elsewhere" else memory
    slot = {"guest_phys_addr": 0, "memory_size": size, "userspace_addr": address(claimed), "backend": kind}
    if where == "unmapped":
        slot["userspace_addr"] = 1 << 45  # far from the program, its heap and its mappings, which move at random
    if where == "guess":
        # A VM, and nothing said of its memory.
        vm = fcntl.ioctl(os.open("/dev/kvm", os.O_RDWR), KVM_CREATE_VM, 0)
        os.set_inheritable(vm, False)
        return audit(arguments)
    claim = os.memfd_create("offmap-memslots")
    os.write(claim, json.dumps({"schema": "offmap-memslots/1", "slots": [slot], "excluded": []}).encode())
    return audit(arguments)


def audit(arguments: list[str]) -> int:
    words = ["audit", str(os.getpid()), *arguments]
    if prepared := os.environ.get("OFFMAP_PREPARED"):  # prepared_target.py
        ask, answer = map(int, prepared.split())
        os.write(ask, json.dumps(["offmap", *words]).encode())
        return os.read(answer, 1)[0]
    return subprocess.run([sys.executable, "-m", "offmap.cli.main", *words], check=False, close_fds=True).returncode


if __name__ == "__main__":
    sys.exit(main())
