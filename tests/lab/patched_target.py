"""What test_patched.py does on a patched host: ``patched_target.py WHAT [KIND]`` prints JSON.

KIND of memory: memfd (the control), secretmem, or unmapped (guest_memfd without a direct map).
"""

import ctypes
import errno
import json
import mmap
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offmap.audit.kcore import Kcore
from offmap.audit.mappings import covered
from offmap.audit.pagemap import pfn, present, read_pagemap
from offmap.audit.roots import walk_kcore
from offmap.kvm import Kvm, Vcpu, Vm
from offmap.memory.backing import Backing
from offmap.memory.guest import GuestMemory
from offmap.memory.guest_memfd import MAPPABLE, guest_memfd_flags, map_guest_memfd
from offmap.memory.guest_memfd_unmapped import unknown_flags
from offmap.memory.populate import populate
from offmap.memory.secretmem import secret_backing
from offmap.uapi.kvm import KVM_EXIT_HLT

MIB = 1 << 20
PAGE = 4096
SIZE = 8 * MIB
BLOCK = 1 << 16  # bytes that are handed to each system call
FALLOC_FL_KEEP_SIZE = 1  # linux/falloc.h
FALLOC_FL_PUNCH_HOLE = 2
SYS_IO_URING_SETUP = 425
SYS_IO_URING_REGISTER = 427
IORING_REGISTER_BUFFERS = 0

libc = ctypes.CDLL(None, use_errno=True)


class iovec(ctypes.Structure):
    _fields_ = [("iov_base", ctypes.c_void_p), ("iov_len", ctypes.c_size_t)]


@contextmanager
def memory(kind: str, size: int = SIZE) -> Iterator[tuple[Vm, Backing]]:
    """Memory of a kind, every page of it populated, and the VM that it belongs to."""
    with ExitStack() as stack:
        kvm = stack.enter_context(Kvm())
        vm = stack.enter_context(kvm.create_vm())
        if kind == "memfd":
            fd = os.memfd_create("control")
            os.ftruncate(fd, size)
            backing = Backing("memfd", fd, size)
            os.close(fd)
        elif kind == "secretmem":
            backing = secret_backing(size)
        else:
            backing = map_guest_memfd(vm, size, MAPPABLE | no_direct_map_flag(vm))
        stack.enter_context(backing)
        populate(backing, 1)
        yield vm, backing


def no_direct_map_flag(vm: Vm) -> int:
    return next(unknown_flags(guest_memfd_flags(vm)))


def frames(backing: Backing, pid: int | str = "self") -> NDArray[np.uint64]:
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)
    try:
        entries = read_pagemap(fd, backing.address, backing.size // PAGE)
    finally:
        os.close(fd)
    return pfn(entries[present(entries)])


def mapped(pfns: NDArray[np.uint64]) -> int:
    """How many of some page frames the kernel has a mapping of, anywhere."""
    with Kcore() as kcore:
        walk = walk_kcore(kcore)
    assert not walk.unreadable
    return int(np.count_nonzero(covered(walk.runs, pfns)))


def off_map() -> int:
    """Pages that the kernel's blocks of unmapped memory hold, whether they are in a file or not."""
    fields = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(fields["nr_no_direct_map"])


def await_return(left: int) -> None:
    """Wait until no more than `left` pages are off the direct map: a block returns when nobody looks at it any more."""
    while off_map() > left:
        time.sleep(0.01)


def failure(action: Callable[[], object]) -> str:
    """The errno that an action fails with, by name; empty if it does not fail."""
    try:
        action()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return ""


def call(name: str, *arguments: Any) -> int:
    result: int = getattr(libc, name)(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


def refusals(kind: str) -> Any:
    """The errno of everything else that gets at a process's pages by GUP, in both directions."""
    result = {}
    scratch = mmap.mmap(-1, BLOCK)
    ours = iovec(ctypes.addressof(ctypes.c_char.from_buffer(scratch)), BLOCK)
    out = Path(os.environ["OFFMAP_OUT"]) / f"direct-{kind}"
    out.write_bytes(bytes(BLOCK))
    direct = os.open(out, os.O_RDWR | os.O_DIRECT)
    with memory(kind) as (_, backing):
        view = backing.view[:BLOCK]
        theirs = iovec(backing.address, BLOCK)

        def vm_rw(name: str) -> int:
            one, flags = ctypes.c_ulong(1), ctypes.c_ulong(0)
            return call(name, os.getpid(), ctypes.byref(ours), one, ctypes.byref(theirs), one, flags)

        def vmsplice() -> int:
            reader, writer = os.pipe()
            try:
                return call("vmsplice", writer, ctypes.byref(theirs), ctypes.c_ulong(1), 0)
            finally:
                os.close(reader)
                os.close(writer)

        def fixed_buffer() -> int:
            ring = call("syscall", SYS_IO_URING_SETUP, 4, ctypes.create_string_buffer(120))
            try:
                return call("syscall", SYS_IO_URING_REGISTER, ring, IORING_REGISTER_BUFFERS, ctypes.byref(theirs), 1)
            finally:
                os.close(ring)

        def proc_mem(write: bool) -> None:
            with open("/proc/self/mem", "r+b", buffering=0) as file:  # noqa: PTH123 (unbuffered)
                file.seek(backing.address)
                file.write(b"x") if write else file.read(1)

        result["O_DIRECT write"] = failure(lambda: os.pwritev(direct, [view], 0))
        result["O_DIRECT read"] = failure(lambda: os.preadv(direct, [view], 0))
        result["process_vm_readv"] = failure(lambda: vm_rw("process_vm_readv"))
        result["process_vm_writev"] = failure(lambda: vm_rw("process_vm_writev"))
        result["vmsplice"] = failure(vmsplice)
        result["io_uring fixed buffer"] = failure(fixed_buffer)
        result["/proc/self/mem read"] = failure(lambda: proc_mem(False))
        result["/proc/self/mem write"] = failure(lambda: proc_mem(True))
        # By user address, which is how devices are emulated: all work. (The output folder's file system goes by GUP.)
        with tempfile.TemporaryFile(buffering=0) as plain:
            result["write"] = failure(lambda: os.pwritev(plain.fileno(), [view], 0))
            result["read"] = failure(lambda: os.preadv(plain.fileno(), [view], 0))
    os.close(direct)
    return result


def restored(kind: str) -> Any:
    """Mapped pages before and after each way out, and whether anything of the guest is left in them."""
    before = off_map()
    with memory(kind) as (_, backing):
        pfns = frames(backing)
        result = {"pages": len(pfns), "used": mapped(pfns)}
        if backing.guest_memfd is not None:
            half = backing.size // 2
            mode = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
            call("fallocate", backing.guest_memfd, mode, ctypes.c_long(0), ctypes.c_long(half))
            await_return(before + len(pfns) // 2)
            result["punched"] = mapped(pfns[: len(pfns) // 2])
            result["not punched"] = mapped(pfns[len(pfns) // 2 :])
    await_return(before)
    result["closed"] = mapped(pfns)
    child = subprocess.Popen(
        [sys.executable, __file__, "hold", kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    pfns = np.array(json.loads(child.stdout.readline()), dtype=np.uint64)
    result["held"] = mapped(pfns)
    child.send_signal(signal.SIGKILL)
    child.wait()
    await_return(before)
    result["killed"] = mapped(pfns)
    return result


def hold(kind: str) -> Any:
    """Use memory, say which, and wait to be killed."""
    with memory(kind) as (_, backing):
        print(json.dumps(frames(backing).tolist()), flush=True)
        sys.stdin.read()


def poisoned(_kind: str) -> Any:
    """A page that is poisoned stays off the direct map until it is unpoisoned; all others come back as ever."""
    inject = Path("/sys/kernel/debug/hwpoison")
    before = off_map()
    with memory("unmapped") as (_, backing):
        pfns = frames(backing)
        bad, others = pfns[5:6], np.delete(pfns, 5)
        with suppress(OSError):  # it says EBUSY: guest_memfd keeps the page, and it is poisoned all the same
            (inject / "corrupt-pfn").write_text(f"{int(bad[0])}\n")
        result = {"pages": len(pfns), "poisoned": mapped(bad), "others": mapped(others)}
    await_return(before)
    result |= {"poisoned, closed": mapped(bad), "others, closed": mapped(others)}
    (inject / "unpoison-pfn").write_text(f"{int(bad[0])}\n")
    return result | {"unpoisoned": mapped(bad)}


def at_start(vcpu: Vcpu) -> Vcpu:
    """Have a vCPU begin in real mode, at 0x1000."""
    sregs = vcpu.get_sregs()
    sregs.cs.base, sregs.cs.selector = 0, 0
    vcpu.set_sregs(sregs)
    regs = vcpu.get_regs()
    regs.rip, regs.rflags = PAGE, 2
    vcpu.set_regs(regs)
    return vcpu


def clock(kind: str) -> Any:
    """Register pvclocks at good and bad addresses from a guest: what is written there, and that the guest goes on.

    The guest, in real mode at 0x1000: ``mov ecx, MSR; mov eax, ADDRESS; mov edx, ADDRESS >> 32; wrmsr; hlt``.
    """
    result = {}
    size = 16 * PAGE
    for name, address in (
        ("good", 0x2000),
        ("two pages", 0x2FF0),
        ("beyond the end", size - 16),
        ("no memory", 0x4000_0000),
        ("no address", 0xFFFF_FFFF_FFFF_F000),
    ):
        for msr in (0x12, 0x4B56_4D01):  # MSR_KVM_SYSTEM_TIME, _NEW
            with memory(kind, size) as (vm, backing):
                code = b"\x66\xb9" + struct.pack("<I", msr) + b"\x66\xb8" + struct.pack("<I", address & 0xFFFF_FFFF | 1)
                code += b"\x66\xba" + struct.pack("<I", address >> 32) + b"\x0f\x30\xf4"
                backing.view[PAGE : PAGE + len(code)] = code
                (guest := GuestMemory([backing])).map_into(vm)
                vm.reserve_vmx_pages()
                with vm.create_vcpu(0) as vcpu:
                    halted = at_start(vcpu).run() == KVM_EXIT_HLT
                written = struct.unpack_from("<I4xQQIb", guest.view(0x2000, 64)) if name == "good" else ()
                result[f"{name} {msr:#x}"] = {
                    "halted": halted,
                    # pvclock-abi.h: struct pvclock_vcpu_time_info
                    "version": written[0] if written else None,
                    "multiplier": written[3] if written else None,
                }
    return result


if __name__ == "__main__":
    what, kind_of_memory = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
    print(json.dumps(globals()[what](kind_of_memory)))
