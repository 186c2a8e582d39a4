"""A machine's life on any thread: made, started, paused, resumed, stopped and closed, in every order."""

import select
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from offmap.boot.linux import BootSource
from offmap.devices.virtio.rng import parse_rng
from offmap.errors import BackendRefused, OffmapError
from offmap.hide import NotAudited, Vet
from offmap.kvm import Kvm
from offmap.memory.anon import Anon
from offmap.memory.memfd import Memfd
from offmap.patience import scaled
from offmap.vmm.config import MachineConfig
from offmap.vmm.kick import SIGNAL
from offmap.vmm.machine import Machine
from offmap.vmm.outcome import Outcome, Stop

from .conftest import descriptors

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("kvm")]

MIB = 1 << 20
PROMPT = scaled(10.0)  # seconds, for what takes a hundredth of one

T = TypeVar("T")


@pytest.fixture
def monitor(payload: Callable[[str], Path], kvm: Kvm) -> Path:
    """Give the guest that obeys single letters (payloads/monitor.S), where it can run."""
    return payload("monitor")


def on_another_thread(act: Callable[[], T]) -> T:
    """What `act` returns or raises, on a thread of its own that takes no signal."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            results.append(act())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="another")
    thread.start()
    thread.join(PROMPT)
    assert not thread.is_alive()
    if errors:
        raise errors[0]
    return results[0]


class Guest:
    """The monitor, and what it has said."""

    def __init__(self, kernel: Path, vcpus: int = 2) -> None:
        self.heard = b""
        self.due = threading.Event()  # there may be more to hear
        self.act: Callable[[], object] | None = None  # on the vCPU's thread, with the next line it says
        self.errors: list[OffmapError] = []
        config = MachineConfig(BootSource(kernel, None, ""), Anon(), 32 * MIB, vcpus, vetting=Vet())
        self.machine = on_another_thread(
            lambda: Machine(config.replace(devices=[("rng0", parse_rng(""))]), self._hear, on_event=self.due.set)
        )

    def _hear(self, data: bytes) -> None:
        if self.act is not None:
            act, self.act = self.act, None
            try:
                act()
            except OffmapError as error:
                self.errors.append(error)
        self.heard += data
        self.due.set()

    def says(self, text: bytes) -> None:
        while not self.heard.endswith(text):
            assert self.due.wait(PROMPT), self.heard
            self.due.clear()
            if self.act is None:  # or it would be done here, and not on the vCPU's thread
                self.machine.console.flush()

    def type(self, text: bytes) -> None:
        for number in range(len(text)):
            while not self.machine.console.feed(text[number : number + 1]):
                pass

    def ended(self) -> Stop | None:
        assert select.select([self.machine.stopped_fd], [], [], PROMPT)[0]
        return self.machine.stopped


@contextmanager
def running(kernel: Path, vcpus: int = 2) -> Iterator[Guest]:
    guest = Guest(kernel, vcpus)
    try:
        on_another_thread(guest.machine.start)
        guest.says(b"U")
        yield guest
    finally:
        on_another_thread(guest.machine.close)


def vcpu_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("vcpu", "virtio"))]


def test_every_step_on_a_thread_of_its_own(monitor: Path) -> None:
    before = descriptors()
    with running(monitor) as guest:
        guest.type(b"a")
        guest.says(b"Ua")
        assert on_another_thread(guest.machine.pause)
        guest.machine.console.feed(b"b")
        assert guest.heard == b"Ua"
        on_another_thread(guest.machine.resume)
        guest.says(b"Uab")
        on_another_thread(lambda: guest.machine.stop(Outcome.QUIT))
        assert guest.ended() == Stop(Outcome.QUIT)
    assert not vcpu_threads()
    assert descriptors() == before


@pytest.mark.parametrize("key", [b"s", b"h"])
def test_a_guest_that_spins_or_halts_is_paused_and_goes_nowhere(monitor: Path, key: bytes) -> None:
    with running(monitor) as guest:
        guest.type(key)
        for _ in range(20):
            assert guest.machine.pause()
            vcpu = guest.machine._loops[0].vcpu
            place = vcpu.get_regs().rip, vcpu.get_sregs().cr3
            assert (vcpu.get_regs().rip, vcpu.get_sregs().cr3) == place
            guest.machine.resume()
        assert guest.machine.stopped is None


def test_nothing_is_lost_by_pauses(monitor: Path) -> None:
    text = b"abcdegijlnopuvwxy" * 40
    with running(monitor) as guest:
        for number in range(0, len(text), 5):
            guest.type(text[number : number + 5])
            assert guest.machine.pause()
            guest.machine.resume()
        guest.says(text)
        assert guest.heard == b"U" + text


def test_what_is_done_twice_or_too_early(monitor: Path) -> None:
    guest = Guest(monitor)
    with guest.machine as machine:
        machine.resume()
        with pytest.raises(OffmapError, match="has not been started; start it first"):
            machine.pause()
        machine.start()
        with pytest.raises(OffmapError, match="started before"):
            machine.start()
        assert machine.pause()
        assert machine.pause()
        assert machine.seconds_to_tick() is None
        with pytest.raises(OffmapError, match="started before"):
            machine.start()
        machine.resume()
        machine.resume()
        guest.says(b"U")
        machine.stop(Outcome.QUIT)
        assert not machine.pause()
        machine.resume()
        machine.start()
        machine.close()
        machine.close()
        assert not machine.pause()
        machine.resume()
        machine.stop(Outcome.FAILED)
        machine.start()
        assert machine.stopped == Stop(Outcome.QUIT)
    assert not vcpu_threads()


@pytest.mark.parametrize("end", ["close", "stop"])
def test_a_paused_machine_ends(monitor: Path, end: str) -> None:
    before = descriptors()
    with running(monitor) as guest:
        assert guest.machine.pause()
        if end == "close":
            guest.machine.close()
        else:
            guest.machine.stop(Outcome.QUIT)
            assert guest.ended() == Stop(Outcome.QUIT)
            guest.machine.resume()
        assert guest.machine.stopped == Stop(Outcome.QUIT)
    assert not vcpu_threads()
    assert descriptors() == before


def test_one_that_was_stopped_before_it_began_never_runs(monitor: Path) -> None:
    guest = Guest(monitor)
    with guest.machine as machine:
        machine.stop(Outcome.QUIT)
        machine.start()
        assert guest.heard == b""
        assert not [name for name in vcpu_threads() if name.startswith("vcpu")]


@pytest.mark.parametrize("what", ["start", "pause", "resume", "close"])
def test_a_thread_of_its_own_may_stop_it_and_no_more(monitor: Path, what: str) -> None:
    with running(monitor, vcpus=1) as guest:
        guest.act = getattr(guest.machine, what)
        guest.type(b"\n")
        guest.says(b"U\n")
        assert "by a thread of its own" in str(guest.errors[0])
        guest.act = lambda: guest.machine.stop(Outcome.QUIT)
        guest.type(b"\n")
        assert guest.ended() == Stop(Outcome.QUIT)
        assert guest.machine._virtio is not None
        worker = guest.machine._virtio.transports[0].worker
        with pytest.raises(OffmapError, match="by a thread of its own"):
            worker.call(getattr(guest.machine, what))


def test_a_pause_that_waits_ends_with_the_machine(monitor: Path) -> None:
    """A vCPU that waits for whoever reads the console is not to be had."""
    with running(monitor, vcpus=1) as guest:
        waits, go = threading.Event(), threading.Event()

        def wait() -> None:
            waits.set()
            assert go.wait(PROMPT)

        guest.act = wait
        guest.type(b"\n")
        assert waits.wait(PROMPT)
        paused: list[bool] = []
        pausing = threading.Thread(target=lambda: paused.append(guest.machine.pause()))
        pausing.start()
        closing = threading.Thread(target=guest.machine.close)
        closing.start()
        pausing.join(PROMPT)
        assert paused == [False]
        go.set()
        closing.join(PROMPT)
        assert not closing.is_alive()
    assert not vcpu_threads()


def test_many_at_a_time(monitor: Path) -> None:
    """Several machines, each driven by threads that know nothing of each other."""

    def drive() -> None:
        with running(monitor) as guest:
            threads = [
                threading.Thread(target=act) for act in (guest.machine.pause, guest.machine.resume) for _ in range(4)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            guest.machine.resume()
            guest.type(b"q")
            assert guest.ended() == Stop(Outcome.POWERED_OFF)

    drivers = [threading.Thread(target=drive) for _ in range(3)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert not vcpu_threads()


def test_the_processs_own_signals_stay_its_own(monitor: Path) -> None:
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    with running(monitor):
        pass
    assert {number: signal.getsignal(number) for number in signal.valid_signals()} == handlers
    signal.pthread_kill(threading.get_ident(), SIGNAL)  # one that comes late does no harm


def test_configured_piece_by_piece(monitor: Path) -> None:
    config = MachineConfig(BootSource(monitor, None, ""), Anon(), 32 * MIB, vetting=Vet())
    with pytest.raises(OffmapError, match="17 vCPUs"):
        config.replace(vcpus=17)
    config = on_another_thread(lambda: config.replace(backend=Memfd(), vcpus=2))
    config = config.replace(devices=[*config.devices, ("rng0", parse_rng(""))])
    with Machine(config, lambda _: None) as machine:
        machine.start()
        assert machine.pause()
        assert machine.ram.vetting is None


class Promising(Anon):
    """RAM that promises to be hidden, and is not."""

    name = "promising"
    hides = True


def test_what_is_known_of_hidden_ram_stays_with_the_machine(monitor: Path) -> None:
    said: list[str] = []
    source = BootSource(monitor, None, "")
    config = MachineConfig(source, Promising(), 32 * MIB, vetting=NotAudited("no right to"))
    with Machine(config, lambda _: None, say=said.append) as machine:
        assert isinstance(machine.ram.vetting, NotAudited)
        assert machine.ram.to_json()["vetting"] == "placed, not audited"
        assert machine.ram.to_json()["not_audited_because"] == "no right to"
        assert said == ["the guest's RAM is placed, not audited: no right to"]
    before = descriptors()
    # Here, where there is no /proc/kcore, its audit fails; elsewhere it finds the RAM in the direct map.
    with pytest.raises(BackendRefused, match="the promising memory that this host gave cannot be a guest's"):
        Machine(config.replace(vetting=Vet()), lambda _: None)
    assert descriptors() == before
