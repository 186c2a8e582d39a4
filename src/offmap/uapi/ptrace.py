"""Tracing another thread on x86-64: linux/ptrace.h, asm/user_64.h, linux/kcmp.h."""

from ctypes import Structure

from offmap.uapi.members import u64

PTRACE_DETACH = 17
PTRACE_GETREGS = 12
PTRACE_SETREGS = 13
PTRACE_SYSCALL = 24
PTRACE_SEIZE = 0x4206
PTRACE_INTERRUPT = 0x4207
PTRACE_GETSIGMASK = 0x420A
PTRACE_SETSIGMASK = 0x420B

PTRACE_O_TRACESYSGOOD = 1 << 0
PTRACE_O_EXITKILL = 1 << 20

WALL = 0x40000000  # __WALL of linux/wait.h: threads too

ERESTARTSYS = 512  # linux/errno.h, the kernel's own: only a tracer sees it

SYS_kcmp = 312  # arch/x86/entry/syscalls/syscall_64.tbl
KCMP_VM = 1

SYS_mmap = 9
SYS_close = 3
SYS_madvise = 28
SYS_clone = 56
SYS_vfork = 58
SYS_clone3 = 435
SYS_ioctl = 16
SYS_seccomp = 317
SYS_ioctl_i386 = 54
SYS_ioctl_x32 = 514
SYSCALL_INSTRUCTION = b"\x0f\x05"


class user_regs_struct(Structure):
    _fields_ = u64(
        "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss "
        "fs_base gs_base ds es fs gs"
    )
