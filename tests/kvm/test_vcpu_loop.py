"""The vCPU's loop: what a guest's instructions become at the devices, and how it ends."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress

import pytest

from offmap.devices.bus import MmioBus, PioBus
from offmap.kvm import Vm
from offmap.memory.guest import GuestMemory
from offmap.patience import scaled
from offmap.uapi import kvm as uapi
from offmap.vmm import vcpu_loop
from offmap.vmm.outcome import Outcome, Stop
from offmap.vmm.vcpu_loop import ExitCounts, VcpuLoop

from .real_mode import DATA, END_PORT, TO, load

pytestmark = pytest.mark.kvm

# Left as it is: a thread that ends may take the last signal only after it has let others know.
signal.signal(signal.SIGUSR1, lambda *_: None)

END = b"\xba\x00\x06\xee\xf4"  # mov dx, END_PORT; out dx, al; hlt
PORT = 0x100
PROMPT = scaled(5.0)  # seconds in which a kicked vCPU must be out; it takes milliseconds


class Recorder:
    """A device that writes down what reaches it, and reads as a count of its reads."""

    byte_wide = False

    def __init__(self) -> None:
        self.writes: list[tuple[int, int, int]] = []
        self.written = threading.Event()
        self.reads: list[tuple[int, int]] = []

    def ports(self) -> Sequence[range]:
        return (range(PORT, PORT + 8),)

    def read(self, port: int, size: int) -> int:
        self.reads.append((port, size))
        return (0x8182838485868788 + len(self.reads) - 1) & (1 << 8 * size) - 1

    def write(self, port: int, size: int, value: int) -> None:
        self.writes.append((port, size, value))
        self.written.set()


class End:
    """A device whose port ends the loop."""

    byte_wide = True

    def __init__(self, on_write: Callable[[], None]) -> None:
        self._on_write = on_write

    def ports(self) -> Sequence[range]:
        return (range(END_PORT, END_PORT + 1),)

    def read(self, port: int, size: int) -> int:
        return 0

    def write(self, port: int, size: int, value: int) -> None:
        self._on_write()


class Rig:
    """One vCPU with a recorder on its ports and in its memory at 0x20000."""

    def __init__(self, vm: Vm, owned: ExitStack, code: bytes) -> None:
        vcpu, memory = load(vm, code)
        self.memory: GuestMemory = owned.enter_context(memory)
        owned.enter_context(vcpu)
        self.device, self.mmio = Recorder(), Recorder()
        self.counts = ExitCounts()
        pio, mmio = PioBus(), MmioBus()
        pio.attach(self.device)
        pio.attach(End(self._end))
        mmio.attach(0x20000, 0x1000, self.mmio)
        self.loop = VcpuLoop(vcpu, pio, mmio, self.counts)

    def _end(self) -> None:
        self.loop.request_stop()

    def run(self) -> Stop | None:
        return self.loop.run()


@pytest.fixture
def rig(vm: Vm) -> Iterator[Callable[[bytes], Rig]]:
    """Give a function that loads real-mode code."""
    with ExitStack() as owned:
        yield lambda code: Rig(vm, owned, code)


def test_out_of_every_size(rig: Callable[[bytes], Rig]) -> None:
    machine = rig(
        b"\xba\x00\x01"  # mov dx, PORT
        b"\xb0\x11\xee"  # mov al; out dx, al
        b"\xb8\x33\x22\xef"  # mov ax; out dx, ax
        b"\x66\xb8\x77\x66\x55\x44\x66\xef" + END  # mov eax; out dx, eax
    )
    assert machine.run() is None
    assert machine.device.writes == [(PORT, 1, 0x11), (PORT, 2, 0x2233), (PORT, 4, 0x44556677)]
    assert machine.counts["io", PORT, "out"] == 3
    assert machine.counts["io", END_PORT, "out"] == 1


def test_in_of_every_size(rig: Callable[[bytes], Rig]) -> None:
    machine = rig(
        b"\xba\x02\x01"  # mov dx, PORT + 2
        b"\x66\x31\xc0\xec\x66\xa3\x00\x30"  # xor eax, eax; in al, dx; mov [TO], eax
        b"\x66\x31\xc0\xed\x66\xa3\x04\x30"  # in ax, dx
        b"\x66\x31\xc0\x66\xed\x66\xa3\x08\x30" + END  # in eax, dx
    )
    assert machine.run() is None
    assert machine.device.reads == [(PORT + 2, size) for size in (1, 2, 4)]
    values = [int.from_bytes(machine.memory.read(TO + 4 * n, 4), "little") for n in range(3)]
    assert values == [0x88, 0x8789, 0x8586878A]
    assert machine.counts["io", PORT + 2, "in"] == 3


@pytest.mark.parametrize(("size", "opcode"), [(1, b"\x6e"), (2, b"\x6f"), (4, b"\x66\x6f")])
def test_string_output_comes_whole_and_in_order(rig: Callable[[bytes], Rig], size: int, opcode: bytes) -> None:
    count = 300
    prefix, opcode = opcode[:-1], opcode[-1:]
    machine = rig(
        b"\xba\x00\x01\xfc\xbe\x00\x20\xb9"  # mov dx, PORT; cld; mov si, DATA; mov cx,
        + count.to_bytes(2, "little")
        + prefix
        + b"\xf3"
        + opcode  # rep outs
        + END
    )
    data = bytes(n * 7 & 0xFF for n in range(count * size))
    machine.memory.write(DATA, data)
    assert machine.run() is None
    assert b"".join(value.to_bytes(width, "little") for _, width, value in machine.device.writes) == data
    assert {(port, width) for port, width, _ in machine.device.writes} == {(PORT, size)}
    assert machine.counts["io", PORT, "out"] == count, "each access counts, however KVM batches them"


def test_string_input_fills_memory_in_order(rig: Callable[[bytes], Rig]) -> None:
    machine = rig(b"\xba\x00\x01\xfc\xbf\x00\x30\xb9\x2c\x01\xf3\x6c" + END)  # rep insb of 300 to TO
    assert machine.run() is None
    expected = bytes((0x88 + n) & 0xFF for n in range(300))
    assert machine.memory.read(TO, 300) == expected
    # KVM reads ahead, so that the device may be asked for more than the guest takes in this instruction, never less.
    assert machine.device.reads[:300] == [(PORT, 1)] * 300


def test_ports_where_nobody_is(rig: Callable[[bytes], Rig]) -> None:
    machine = rig(b"\xba\x00\x05\x66\xef\x66\x31\xc0\xec\x66\xa3\x00\x30" + END)
    assert machine.run() is None
    assert machine.memory.read(TO, 4) == b"\xff\0\0\0"
    assert (machine.device.writes, machine.device.reads) == ([], [])


def test_device_memory(rig: Callable[[bytes], Rig]) -> None:
    machine = rig(
        b"\xb8\x00\x20\x8e\xd8"  # mov ax, 0x2000; mov ds, ax
        b"\xb0\x5a\xa2\x08\x00"  # mov [8], al
        b"\xb8\x34\x12\xa3\x10\x00"  # mov [0x10], ax
        b"\xa1\x20\x00"  # mov ax, [0x20]
        b"\x31\xdb\x8e\xdb\xa3\x00\x30" + END  # xor bx, bx; mov ds, bx; mov [TO], ax
    )
    assert machine.run() is None
    assert machine.mmio.writes == [(8, 1, 0x5A), (0x10, 2, 0x1234)]
    assert machine.mmio.reads == [(0x20, 2)]
    assert machine.memory.read(TO, 2) == b"\x88\x87"
    assert machine.counts["mmio", 0x20000, "out"] == 2
    assert machine.counts["mmio", 0x20000, "in"] == 1


def test_device_memory_straight_after_an_exception(rig: Callable[[bytes], Rig]) -> None:
    machine = rig(
        b"\xb8\x00\x20\x8e\xd8\xb9\x64\x00"  # mov ax, 0x2000; mov ds, ax; mov cx, 100
        b"\x31\xdb\xb8\x05\x00\xf6\xf3"  # again: xor bx, bx; mov ax, 5; div bl: #DE
        b"\xa2\x08\x00\xe2\xf4" + END  # mov [8], al; loop again
    )
    machine.memory.write(0, (0x1100).to_bytes(4, "little"))  # vector 0
    machine.memory.write(0x1100, b"\xb3\x01\xcf")  # mov bl, 1; iret: divides again, by 1
    assert machine.run() is None
    assert machine.mmio.writes == [(8, 1, 5)] * 100


@pytest.mark.parametrize("before", [True, False], ids=["before it runs", "while it runs"])
def test_stop_ends_a_guest_that_spins(rig: Callable[[bytes], Rig], before: bool) -> None:
    machine = rig(b"\xba\x00\x01\xee\xeb\xfe")  # out dx, al: it is in the guest; jmp .
    ends: list[Stop | None] = []
    thread = threading.Thread(target=lambda: ends.append(machine.run()))
    if before:
        machine.loop.request_stop()
    thread.start()
    if not before:
        assert machine.device.written.wait(PROMPT)
        machine.loop.request_stop()
        assert thread.ident
        signal.pthread_kill(thread.ident, signal.SIGUSR1)
    thread.join(PROMPT)
    assert not thread.is_alive()
    assert ends == [None]


def test_signals_alone_do_not_stop_it(rig: Callable[[bytes], Rig]) -> None:
    machine = rig(b"\xba\x00\x01\xb9\x00\x10\xee\xe2\xfd" + END)  # 4096 outs
    thread = threading.Thread(target=machine.run)
    thread.start()
    while thread.is_alive() and thread.ident:
        with suppress(ProcessLookupError):
            signal.pthread_kill(thread.ident, signal.SIGUSR1)
        thread.join(0.0005)
    assert len(machine.device.writes) == 4096


def failure(stop: Stop | None) -> str:
    assert stop is not None and stop.error is not None
    assert stop.outcome is Outcome.FAILED
    assert "\n" not in str(stop.error)
    return str(stop.error)


def test_exits_that_nobody_expects_are_named(rig: Callable[[bytes], Rig]) -> None:
    text = failure(rig(b"\xf4").run())
    assert f"the guest left with KVM exit {uapi.KVM_EXIT_HLT}, which offmap does not know" in text


def test_memory_that_goes_away(rig: Callable[[bytes], Rig]) -> None:
    machine = rig(b"\xf4")
    machine.memory.close()
    # EFAULT from KVM_RUN; where KVM emulates every instruction, an internal error.
    assert "KVM" in failure(machine.run())


def test_counts_of_what_a_guest_touches_stay_few(rig: Callable[[bytes], Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vcpu_loop, "_MOST_COUNTS", 4)
    # mov ax, 0x3000 + n * 0x100; mov ds, ax; mov [0], al: eight pages where nothing is
    code = b"".join(bytes((0xB8, 0x00, 0x30 + n, 0x8E, 0xD8, 0xA2, 0x00, 0x00)) for n in range(8))
    machine = rig(code + END)
    assert machine.run() is None
    pages = [key for key in machine.counts if key[0] == "mmio"]
    assert len(pages) == 4
    assert machine.counts["mmio elsewhere", 0, "out"] == 4
