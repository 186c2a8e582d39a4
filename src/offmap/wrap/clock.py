"""The guest's clock: a guest without kvm-clock may have nothing but the TSC, and no way to measure how fast that is.

So it is told, on its kernel's command line. A VMM may write that line after it has set the first registers (Firecracker
does), and no call of it tells when the guest begins. So the guest waits at its kernel's first instruction, which jumps
to itself until the line has been completed.
"""

import ctypes

from offmap.uapi import bootparam as bp
from offmap.uapi import kvm
from offmap.wrap.source import Piece

_SPIN = 0xFEEB  # jmp to itself
_FLAGS = 0x2  # RFLAGS as boot protocols have it: its reserved bit, and no interrupts
_UNUSED = ("rax", "rcx", "rdx", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15")
_ADDRESS_SPACE = 16  # bits of a slot's number below that of its address space: Documentation/virt/kvm/api.rst
_START_INFO = 0x336EC578  # XEN_HVM_START_MAGIC_VALUE of xen/include/public/arch-x86/hvm/start_info.h
_START_INFO_COMMAND_LINE = 24  # u64: cmdline_paddr, the same


def words_for(khz: int) -> str:
    """What a Linux guest whose TSC has this frequency is told on its command line."""
    return f"tsc=reliable tsc_early_khz={khz}"


class GuestRam:
    """What was placed, where the guest has it, and where this process does. It is closed when nobody needs it."""

    def __init__(self) -> None:
        self._placed: list[tuple[int, Piece]] = []  # by the VMM's address
        # Guest-physical address, bytes and VMM's address, by the VM's file descriptor and the slot's number.
        self._slots: dict[tuple[int, int], tuple[int, int, int]] = {}
        self._closed = False

    def add(self, address: int, piece: Piece) -> None:
        """Take a piece that was placed at this address of the VMM."""
        if self._closed:
            piece.close()
        else:
            self._placed.append((address, piece))

    def set_slot(self, vm: int, region: kvm.kvm_userspace_memory_region) -> None:
        """A slot has been set, by the file descriptor `vm`."""
        if not region.slot >> _ADDRESS_SPACE:  # else it is of System Management Mode
            self._slots[vm, region.slot] = region.guest_phys_addr, region.memory_size, region.userspace_addr

    def vms(self) -> set[int]:
        """The file descriptors by which slots have been set."""
        return {vm for vm, _ in self._slots}

    def forget(self, vms: set[int]) -> None:
        """These VMs have been closed. Where none is left, what is placed from now on is kept again."""
        self._slots = {key: slot for key, slot in self._slots.items() if key[0] not in vms}
        self._closed = self._closed and bool(self._slots)

    def at(self, guest_phys_addr: int, size: int) -> int | None:
        """Our address of `size` bytes of the guest's; None if they are not in one piece of its RAM.

        Nor is it known where one process has several VMs.
        """
        if len(self.vms()) > 1:
            return None
        for start, length, address in self._slots.values():
            if start <= guest_phys_addr and guest_phys_addr + size <= start + length:
                theirs = address + guest_phys_addr - start
                for first, piece in reversed(self._placed):  # the VMM may have been replaced by exec
                    if first <= theirs and theirs + size <= first + piece.size:
                        return piece.address + theirs - first
        return None

    def close(self) -> None:
        """End our access to it."""
        for _, piece in self._placed:
            piece.close()
        self._placed.clear()
        self._closed = True


def boots_linux(regs: kvm.kvm_regs, ram: GuestRam) -> bool:
    """Whether these are the first registers of a kernel, by the 64-bit or 32-bit protocol of Linux, or by PVH.

    A guest that runs already has others: interrupts are on in user space, and a kernel is at high addresses.
    """
    data = (regs.rsi, regs.rbx)
    return (
        regs.rflags == _FLAGS
        and not any(getattr(regs, name) for name in _UNUSED)
        and sum(bool(address) for address in data) == 1
        and ram.at(regs.rip, 2) is not None
        and ram.at(max(data), bp.BOOT_PARAMS_SIZE) is not None
    )


class Waiting:
    """A guest that waits at its first instruction.

    Args:
        khz: the frequency of its TSC.
    """

    def __init__(self, ram: GuestRam, regs: kvm.kvm_regs, khz: int) -> None:
        self._ram = ram
        self._data = max(regs.rsi, regs.rbx)
        self.words = words_for(khz)
        self._entry = ctypes.c_uint16.from_address(ram.at(regs.rip, 2) or 0)
        self._instruction = self._entry.value
        self._entry.value = _SPIN

    def complete(self) -> bool:
        """Put the words on the command line, and have the guest go on. Whether there is a line that has them now."""
        done = self._entry.value == _SPIN and self._tell()  # else the kernel was loaded after its registers
        self.go_on()
        return done

    def go_on(self) -> None:
        """Have the guest go on."""
        if self._entry.value == _SPIN:
            self._entry.value = self._instruction

    def _tell(self) -> bool:
        at = self._command_line()
        here = None if at is None else self._ram.at(at, bp.COMMAND_LINE_SIZE)
        if here is None:
            return False
        line = ctypes.string_at(here, bp.COMMAND_LINE_SIZE)
        old, _, rest = line.partition(b"\0")
        if b"tsc_early_khz=" in old:
            return True
        # In front: what follows a -- is init's.
        new = self.words.encode() + b" " + old + b"\0"
        more = len(new) - len(old) - 1
        if any(rest[:more]) or len(rest) < more:
            return False
        ctypes.memmove(here, new, len(new))
        return True

    def _command_line(self) -> int | None:
        """Its guest-physical address; None if neither protocol's structure says it."""
        data = self._ram.at(self._data, bp.BOOT_PARAMS_SIZE)
        if data is None:
            return None
        page = ctypes.string_at(data, bp.BOOT_PARAMS_SIZE)

        def number(offset: int, size: int) -> int:
            return int.from_bytes(page[offset : offset + size], "little")

        if page[bp.HEADER : bp.HEADER + 4] == bp.HEADER_MAGIC:
            return number(bp.CMD_LINE_PTR, 4) | number(bp.EXT_CMD_LINE_PTR, 4) << 32
        return number(_START_INFO_COMMAND_LINE, 8) if number(0, 4) == _START_INFO else None
