"""The vCPU's inner loop: enter the guest, answer its exit, enter it again.

The interpreter's share of an exit is what this costs beyond the same loop in C (benchmarks/exit_cost.py). Entering a
guest makes the processor forget the interpreter's branches. So few instructions count most: the exit that a guest makes
by far the most, one byte at a port, is answered by one ioctl, three reads of memory, one look-up and the device's own
method. Everything else takes the long way round.
"""

import struct
from collections import Counter
from collections.abc import Callable, Mapping
from fcntl import ioctl

from offmap.devices.bus import MmioBus, PioBus
from offmap.errors import KernelError, OffmapError
from offmap.kvm import Vcpu
from offmap.typed import Any
from offmap.uapi import kvm as uapi
from offmap.uapi.page import PAGE_MASK, PAGE_SIZE
from offmap.vmm.outcome import Outcome, Stop

ExitCounts = Counter[tuple[str, int, str]]
"""How often the guest left, by (reason, port or address, direction)."""

_ByteAccess = tuple[bool, Callable[..., Any], int]
"""Is it an ``out``, the device's `write` or `read`, the port. One table for both, as a look-up is paid with each exit:
hence Any, for what either returns."""

# struct kvm_run: exit_reason at 8, the exit's own union at 32.
_EXIT_REASON = struct.Struct("<I")
_EXIT_REASON_OFFSET = 8
_EXIT_IO = struct.Struct("<BBHIQ")  # io.direction, .size, .port, .count, .data_offset
_EXIT_MMIO = struct.Struct("<Q8sIB")  # mmio.phys_addr, .data, .len, .is_write
_EXIT_UNION_OFFSET = 32
_MMIO_DATA_OFFSET = 40
_IMMEDIATE_EXIT_OFFSET = 1
_IO_WORD = struct.Struct("<BBHI")  # io.direction, .size, .port, .count, as one 64-bit word
_IO_WORD_INDEX = _EXIT_UNION_OFFSET // 8
_PIO_DATA_OFFSET = uapi.KVM_PIO_PAGE_OFFSET * PAGE_SIZE  # what io.data_offset is where count is 1
_SIZES: Mapping[int, struct.Struct] = {1: struct.Struct("<B"), 2: struct.Struct("<H"), 4: struct.Struct("<I")}

_MOST_COUNTS = 1 << 14  # different MMIO pages and ports; beyond them MMIO is counted as one

_KVM_SYSTEM_EVENT_NAMES = {1: "SHUTDOWN", 2: "RESET", 3: "CRASH"}
_KVM_INTERNAL_ERROR_DELIVERY_EV = 3
_KVM_INTERNAL_ERROR_NAMES = {
    1: "emulation",
    2: "simultaneous exceptions",
    _KVM_INTERNAL_ERROR_DELIVERY_EV: "delivery of an event",
    4: "unexpected exit",
}
_MOST_DELIVERY_EXITS = 100  # in succession, with the same registers


class VcpuLoop:
    """Runs one vCPU until the machine stops.

    Args:
        counts: where to count exits, or None not to.
    """

    def __init__(self, vcpu: Vcpu, pio: PioBus, mmio: MmioBus, counts: ExitCounts | None = None) -> None:
        self.vcpu = vcpu
        self._pio = pio
        self._mmio = mmio
        self._counts = counts
        self._stop = False
        self._delivery_exits = 0
        self._delivery_registers = b""

    def request_stop(self) -> None:
        """Make `run` return; the caller then sends the thread a signal, in case it is in the guest.

        The access to a device that the guest was making is completed first.
        """
        self._stop = True
        # The kernel looks at this before it enters the guest, so that a signal that came before KVM_RUN is not lost.
        self.vcpu.area[_IMMEDIATE_EXIT_OFFSET] = 1

    def withdraw_stop(self) -> None:
        """Let `run` go on where it was."""
        self.vcpu.area[_IMMEDIATE_EXIT_OFFSET] = 0
        self._stop = False

    def run(self) -> Stop | None:
        """Run the guest on this vCPU. Returns why the guest stopped by itself, or None if `request_stop` ended it."""
        bytes_at = self._byte_accesses() if self._counts is None else {}
        with memoryview(self.vcpu.area) as area, area.cast("Q") as words:
            return self._run(bytes_at, area, words)

    def _byte_accesses(self) -> dict[int, _ByteAccess]:
        """How to answer each access of one byte to a port that a device claims, by the exit's own word."""
        table: dict[int, _ByteAccess] = {}
        for port, read, write in self._pio.claimed():
            for direction, access in ((uapi.KVM_EXIT_IO_IN, read), (uapi.KVM_EXIT_IO_OUT, write)):
                word = int.from_bytes(_IO_WORD.pack(direction, 1, port, 1), "little")
                table[word] = (direction == uapi.KVM_EXIT_IO_OUT, access, port)
        return table

    def _run(self, bytes_at: Mapping[int, _ByteAccess], area: memoryview, words: memoryview) -> Stop | None:
        fd, kvm_run, exit_io = self.vcpu.fd, uapi.KVM_RUN, uapi.KVM_EXIT_IO
        reason_at, word_at, data_at = _EXIT_REASON_OFFSET, _IO_WORD_INDEX, _PIO_DATA_OFFSET
        while True:
            try:
                # No third argument, which is 0 then. An int makes fcntl.ioctl (3.11) try it as a buffer twice and make
                # a TypeError each time before it takes it: that was half of the interpreter's share.
                ioctl(fd, kvm_run)
            except (InterruptedError, BlockingIOError):
                # A signal, or request_stop; or (EAGAIN) a vCPU that waits for its SIPI was woken.
                if self._stop:
                    return None
                continue
            except OSError as error:
                return self._run_failed(error)
            # The lowest byte says it all: exit reasons are small numbers.
            if area[reason_at] == exit_io:
                try:
                    out, access, port = bytes_at[words[word_at]]
                except KeyError:
                    self._io_exit()
                else:
                    if out:
                        access(port, 1, area[data_at])
                    else:
                        area[data_at] = access(port, 1)
            elif stop := self._other_exit():
                return stop

    def _io_exit(self) -> None:
        area = self.vcpu.area
        direction, size, port, count, offset = _EXIT_IO.unpack_from(area, _EXIT_UNION_OFFSET)
        if self._counts is not None:
            self._counts["io", port, "out" if direction else "in"] += count
        data = _SIZES[size]
        for position in range(offset, offset + size * count, size):
            if direction == uapi.KVM_EXIT_IO_OUT:
                self._pio.write(port, size, data.unpack_from(area, position)[0])
            else:
                data.pack_into(area, position, self._pio.read(port, size))

    def _mmio_exit(self) -> None:
        self._delivery_exits = 0  # it gets on
        address, data, length, is_write = _EXIT_MMIO.unpack_from(self.vcpu.area, _EXIT_UNION_OFFSET)
        if self._counts is not None:
            key = ("mmio", address & PAGE_MASK, "out" if is_write else "in")
            # A guest may touch a page of every address there is: a count of each would be the host's memory gone.
            if key not in self._counts and len(self._counts) >= _MOST_COUNTS:
                key = ("mmio elsewhere", 0, key[2])
            self._counts[key] += 1
        if is_write:
            self._mmio.write(address, length, int.from_bytes(data[:length], "little"))
        else:
            value = self._mmio.read(address, length)
            self.vcpu.area[_MMIO_DATA_OFFSET : _MMIO_DATA_OFFSET + length] = value.to_bytes(length, "little")

    def _other_exit(self) -> Stop | None:
        (reason,) = _EXIT_REASON.unpack_from(self.vcpu.area, _EXIT_REASON_OFFSET)
        if reason == uapi.KVM_EXIT_MMIO:
            self._mmio_exit()
            return None
        if self._counts is not None:
            self._counts["exit", reason, ""] += 1
        match reason:
            case uapi.KVM_EXIT_INTR:
                return None
            case uapi.KVM_EXIT_SHUTDOWN:
                return self._failed("the guest triple-faulted", "check that its kernel suits this CPU, or try another")
            case uapi.KVM_EXIT_FAIL_ENTRY:
                code = self.vcpu.exit_state().fail_entry.hardware_entry_failure_reason
                return self._failed(f"the processor refused to enter the guest (reason {code:#x})")
            case uapi.KVM_EXIT_INTERNAL_ERROR:
                code = self.vcpu.exit_state().internal.suberror
                if code == _KVM_INTERNAL_ERROR_DELIVERY_EV and self._may_enter_again():
                    return None
                name = _KVM_INTERNAL_ERROR_NAMES.get(code, str(code))
                return self._failed(
                    f"KVM gave up on the guest: internal error, {name}",
                    "if other guests do not run under this KVM either, try a disposable host: offmap lab exec",
                )
            case uapi.KVM_EXIT_SYSTEM_EVENT:
                code = self.vcpu.exit_state().system_event.type
                return self._failed(f"KVM reports the system event {_KVM_SYSTEM_EVENT_NAMES.get(code, code)}")
            case uapi.KVM_EXIT_MEMORY_FAULT:
                fault = self.vcpu.exit_state().memory_fault
                return self._failed(f"KVM could not get the guest's memory at {fault.gpa:#x}")
            case _:
                return self._failed(f"the guest left with KVM exit {reason}, which offmap does not know")

    def _may_enter_again(self) -> bool:
        """Tell whether the guest may be entered again after an event's delivery met an instruction to be emulated.

        KVM (since 6.14, on AMD) goes by the type in EXITINTINFO and not by its valid bit (svm_check_emulate_instruction
        in arch/x86/kvm/svm/svm.c), and an emulated processor leaves the type of the last exception there: a driver that
        writes to a device register is then taken for an event that cannot be delivered. Nothing is lost by it: KVM has
        queued the event again if there was one, and rip has not moved. Only a guest that has its IDT or a stack in
        MMIO makes no headway.
        """
        registers = bytes(self.vcpu.get_regs())
        if registers != self._delivery_registers:
            self._delivery_registers = registers
            self._delivery_exits = 0
        self._delivery_exits += 1
        return self._delivery_exits <= _MOST_DELIVERY_EXITS

    def _run_failed(self, error: OSError) -> Stop:
        state = self.vcpu.exit_state()
        if state.exit_reason == uapi.KVM_EXIT_MEMORY_FAULT:
            return self._failed(
                f"KVM could not get the guest's memory at {state.memory_fault.gpa:#x}: {KernelError('KVM_RUN', error)}"
            )
        return Stop(Outcome.FAILED, KernelError(f"KVM_RUN of vCPU {self.vcpu.number}", error))

    def _failed(self, what: str, remedy: str = "") -> Stop:
        try:
            where = f" (vCPU {self.vcpu.number} at rip {self.vcpu.get_regs().rip:#x})"
        except KernelError:
            where = f" (vCPU {self.vcpu.number})"
        return Stop(Outcome.FAILED, OffmapError(what + where, remedy))
