"""The machine: guest memory, vCPUs and devices put together, started, and taken apart again."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack

from offmap.boot.acpi import build_tables
from offmap.boot.acpi.devices import virtio_mmio
from offmap.boot.cpu_state import enter_64bit
from offmap.boot.linux import load_linux
from offmap.devices.bus import MmioBus, PioBus
from offmap.devices.legacy import AbsentPit, SystemControlPortB
from offmap.devices.power import I8042, AcpiPm
from offmap.devices.rtc import Rtc
from offmap.devices.serial import Serial16550A
from offmap.errors import OffmapError
from offmap.hide import Ram
from offmap.kvm import Kvm, Vcpu, Vm
from offmap.owned import Owned
from offmap.typed import TYPE_CHECKING, Protocol
from offmap.uapi import kvm as uapi
from offmap.uapi.pc import COM1_IRQ, RTC_IRQ
from offmap.vmm.command_line import with_machine_parameters
from offmap.vmm.config import MachineConfig
from offmap.vmm.cpuid import enabled_xstate, guest_cpuid
from offmap.vmm.kick import accept_kicks, kick
from offmap.vmm.outcome import Outcome, Stop
from offmap.vmm.vcpu_loop import ExitCounts, VcpuLoop

if TYPE_CHECKING:
    from offmap.devices.virtio.bus import VirtioBus
    from offmap.devices.virtio.device import VirtioDevice
    from offmap.kvm.stats import MappedPages

_DAY = 86400.0


class Gate(Protocol):
    """What each thread of a machine goes through before it does anything for the guest."""

    def device(self, device: "VirtioDevice") -> None:
        """Pass, on the thread of a device."""

    def vcpu(self) -> None:
        """Pass, on the thread of a vCPU."""


class Confines(Protocol):
    """What confines the process of a machine (confinement.py)."""

    def entered(self, machine: "Machine") -> AbstractContextManager[Gate]:
        """Confine the calling thread, and those that are started meanwhile. Raises OffmapError: it cannot be."""


class _VmIrqLine:
    """An input of the in-kernel interrupt controllers."""

    def __init__(self, vm: Vm, gsi: int) -> None:
        self._vm = vm
        self._gsi = gsi

    def set(self, level: bool) -> None:
        self._vm.irq_line(self._gsi, level)


class Machine(Owned):
    """One guest, from its making to its end. A context manager: leaving it leaves no thread, fd or mapping behind.

    What runs when: the constructor makes everything and loads the guest; `start` lets the vCPUs go, each on a thread of
    its own; the caller waits for `stopped_fd`, and calls `tick` and the console's `flush` in between; `close` takes it
    apart. Any thread may call any of it, and two may at the same time: what they do happens one after the other.

    Args:
        config: what to build.
        output: takes what the guest writes to its console.
        on_open: called once when the guest opens its console for input, as Linux does just before init.
        on_event: called (on any thread) when `console.flush`, `tick`, or `console.feed` may be due.
        say: takes a line for the user, on any thread: what a device or its driver did that somebody should know.

    Attributes:
        console: the guest's first serial port.
        stopped_fd: an eventfd that becomes readable when the machine has stopped.
        ram: the guest's RAM, and what is known of it.
        exit_counts: VM exits, where the config asked for them.

    Raises:
        OffmapError: this host cannot make it, or a file is no good.
    """

    def __init__(
        self,
        config: MachineConfig,
        output: Callable[[bytes], None],
        *,
        on_open: Callable[[], None] = lambda: None,
        on_event: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        config.source.check(config.memory_size)
        self.config = config
        self.exit_counts: ExitCounts | None = ExitCounts() if config.count_exits else None
        self._on_event = on_event
        self._threads: list[threading.Thread] = []
        self._lifecycle = threading.RLock()  # of start, pause, resume, close; never taken by stop
        # Of all below. Reentrant, as a signal handler may call stop() inside stop().
        self._changed = threading.Condition(threading.RLock())
        self._stop: Stop | None = None
        self._living: set[threading.Thread] = set()  # those of vCPUs that can be kicked, and have not ended
        self._entered: set[VcpuLoop] = set()  # those that are in the guest, or answer its exits
        self._paused = self._devices_paused = False
        self._virtio: VirtioBus | None = None
        with ExitStack() as building:
            kvm = building.enter_context(Kvm())
            self._vm = building.enter_context(kvm.create_vm())
            self._vm.reserve_vmx_pages()
            self._vm.create_irqchip()
            self.ram = building.enter_context(Ram(config.backend, self._vm, config.memory_size, config.vetting, say))
            memory = self.ram.memory
            vcpus = [building.enter_context(self._vm.create_vcpu(n)) for n in range(config.vcpus)]
            self._set_cpuid(kvm, vcpus)
            kvm.close()  # who has it can make VMs
            self.stopped_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            building.callback(os.close, self.stopped_fd)

            self.console = Serial16550A(
                _VmIrqLine(self._vm, COM1_IRQ), output, on_open=on_open, on_pending=on_event, on_room=on_event
            )
            self._rtc = Rtc(_VmIrqLine(self._vm, RTC_IRQ), on_deadline=on_event)
            pio, mmio = PioBus(), MmioBus()
            for device in (
                self.console,
                self._rtc,
                I8042(lambda: self.stop(Outcome.RESET)),
                AcpiPm(lambda: self.stop(Outcome.POWERED_OFF), lambda: self.stop(Outcome.RESET)),
                SystemControlPortB(),
                AbsentPit(),
            ):
                pio.attach(device)
            places = []
            if config.devices:
                self._virtio = building.enter_context(self._virtio_bus(mmio, vcpus[0], say))
                places = self._virtio.places
            self._loops = [VcpuLoop(vcpu, pio, mmio, self.exit_counts) for vcpu in vcpus]

            tsc_khz = None if config.offers_kvm_clock else vcpus[0].tsc_khz()
            parameters = [place.parameter for place in places] if config.virtio_mmio_cmdline else []
            command_line = with_machine_parameters(config.source.command_line, tsc_khz, parameters)
            entry = load_linux(
                config.source._replace(command_line=command_line),
                memory,
                build_tables(
                    config.vcpus,
                    [virtio_mmio(n, place.address, place.size, place.gsi) for n, place in enumerate(places)],
                ),
                self.ram.excluded,
            )
            enter_64bit(vcpus[0], memory, entry)
            building.callback(self._join)
            self._owned = building.pop_all()

    def _virtio_bus(self, mmio: MmioBus, vcpu: Vcpu, say: Callable[[str], None]) -> "VirtioBus":
        # A guest without devices need not wait for their modules.
        from offmap.devices.virtio.bus import VirtioBus
        from offmap.devices.virtio.device import Surroundings

        surroundings = Surroundings(self.ram.memory, type(self.config.backend), self._vm, say)
        return VirtioBus(self.config.devices, surroundings, self.ram.excluded, mmio, vcpu.area)

    def _set_cpuid(self, kvm: Kvm, vcpus: list[Vcpu]) -> None:
        supported = kvm.supported_cpuid()
        tsc_deadline = bool(kvm.check_extension(uapi.KVM_CAP_TSC_DEADLINE_TIMER))
        hides = self.config.backend.hides
        if hides and not kvm.check_extension(uapi.KVM_CAP_ENFORCE_PV_FEATURE_CPUID):
            raise OffmapError(
                "this kernel has no KVM_CAP_ENFORCE_PV_FEATURE_CPUID: a guest could register a pvclock page, which on "
                "hidden RAM would crash the host",
                "use Linux 5.10 or later",
            )
        for vcpu in vcpus:
            if hides:
                # Leaving the features out of CPUID only hides them; this makes the MSRs fault.
                vcpu.enable_cap(uapi.KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1)
            cpuid = guest_cpuid(
                supported,
                vcpu=vcpu.number,
                vcpus=len(vcpus),
                kvm_clock=self.config.offers_kvm_clock,
                nested=not hides,
                tsc_deadline=tsc_deadline,
            )
            vcpu.set_cpuid(cpuid)
            if (xcr0 := enabled_xstate(cpuid)) is not None:
                vcpu.set_xcr0(xcr0)

    @property
    def devices(self) -> "Sequence[VirtioDevice]":
        """Its virtio devices."""
        return () if self._virtio is None else self._virtio.devices

    def start(self, confinement: "Confines | None" = None) -> None:
        """Let the vCPUs run. To be called once; a machine that has been stopped before never runs.

        Args:
            confinement: is entered before the first of them runs. It is for the whole process, and for good.

        Raises:
            OffmapError: it has been started before, this is a thread of its own, or this process may start no more
                threads, which ends it.
        """
        self._refuse_own_threads("started")
        with self._lifecycle:
            with self._changed:
                if self._stop is not None:
                    return
                if self._threads:
                    raise OffmapError("this machine has been started before", "make another one")
            try:
                if confinement is None:
                    self._start_threads(lambda _: None, lambda: None)
                else:
                    with confinement.entered(self) as gate:
                        self._start_threads(gate.device, gate.vcpu)
            except OffmapError as error:
                self.stop(Outcome.FAILED, error)
                raise

    def _start_threads(self, on_device: "Callable[[VirtioDevice], None]", on_vcpu: Callable[[], None]) -> None:
        if self._virtio is not None:
            self._virtio.start(on_device)
        for loop in self._loops:
            thread = threading.Thread(target=self._run, args=(loop, on_vcpu), name=f"vcpu{loop.vcpu.number}")
            self._threads.append(thread)
            try:
                thread.start()
            except RuntimeError:
                self._threads.remove(thread)
                raise OffmapError(
                    f"this process may start no thread for vCPU {loop.vcpu.number}", "raise RLIMIT_NPROC (ulimit -u)"
                ) from None

    def _run(self, loop: VcpuLoop, first: Callable[[], None]) -> None:
        """The thread of one vCPU."""
        try:
            accept_kicks()  # before this a kick would end the process
            first()
            with self._changed:
                self._living.add(threading.current_thread())
            while self._may_enter(loop):
                if (stop := loop.run()) is not None:
                    self.stop(stop.outcome, stop.error)
        except OffmapError as error:
            self.stop(Outcome.FAILED, error)
        except BaseException:
            self.stop(Outcome.FAILED, OffmapError(f"the thread of vCPU {loop.vcpu.number} died"))
            raise
        finally:
            with self._changed:
                self._entered.discard(loop)
                self._living.discard(threading.current_thread())  # it may not be sent a signal any more
                self._changed.notify_all()

    def _may_enter(self, loop: VcpuLoop) -> bool:
        """Wait while the machine is paused; False once it has stopped."""
        with self._changed:
            self._entered.discard(loop)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._stop is not None or not self._paused)
            if self._stop is not None:
                return False
            loop.withdraw_stop()
            self._entered.add(loop)
            return True

    def _call_out(self) -> None:
        """Make every vCPU leave the guest. `_changed` is held."""
        for loop in self._loops:
            loop.request_stop()
        for thread in self._living:
            if thread is not threading.current_thread():
                kick(thread)

    def pause(self) -> bool:
        """Have vCPUs and devices stand still; when this returns, none of them touches guest memory.

        It takes as long as a device needs that waits for the host (a disk, a reader of the console). A machine that is
        paused already stays so.

        Returns:
            False where the machine has stopped, now or before.

        Raises:
            OffmapError: it has not been started, or this is a thread of its own.
        """
        self._refuse_own_threads("paused")
        with self._lifecycle:
            with self._changed:
                if self._stop is None and not self._threads:
                    raise OffmapError("this machine has not been started", "start it first")
                if self._stop is not None or self._paused:
                    return self._stop is None
                self._paused = True
                self._call_out()
                self._changed.wait_for(lambda: self._stop is not None or not self._entered)
                if self._stop is not None:
                    return False
            if self._virtio is not None:
                self._virtio.pause()
            self._devices_paused = True
            return self._stop is None

    def resume(self) -> None:
        """Go on after `pause`; where it is not paused, or has stopped, do nothing.

        Raises:
            OffmapError: this is a thread of its own.
        """
        self._refuse_own_threads("resumed")
        with self._lifecycle:
            self._resume_devices()
            with self._changed:
                self._paused = False
                self._changed.notify_all()
        self._on_event()  # what became due meanwhile

    def _resume_devices(self) -> None:
        if self._devices_paused:
            self._devices_paused = False
            if self._virtio is not None:
                self._virtio.resume()

    def _refuse_own_threads(self, what: str) -> None:
        """It would wait for itself."""
        if threading.current_thread() in self._living or (self._virtio is not None and self._virtio.is_on_a_worker):
            raise OffmapError(
                f"a machine cannot be {what} by a thread of its own, a vCPU's or a device's",
                "stop it there, or do it on another thread",
            )

    def stop(self, outcome: Outcome, error: OffmapError | None = None) -> None:
        """Stop every vCPU, paused or not; the first call decides what the end was. On any thread, at any time."""
        with self._changed:
            if self._stop is not None:
                return
            self._stop = Stop(outcome, error)
            self._call_out()
            self._changed.notify_all()
            os.eventfd_write(self.stopped_fd, 1)

    @property
    def stopped(self) -> Stop | None:
        """How it ended, or None while it runs."""
        return self._stop

    def mapped_pages(self) -> "MappedPages | None":
        """How KVM's nested page tables map the guest now; None where this KVM does not tell. Not after `close`."""
        return self._vm.mapped_pages()

    def seconds_to_tick(self) -> float | None:
        """How long an event loop may wait before it calls `tick`; None: until `on_event`."""
        due = None if self._paused else self._rtc.next_event()
        # No longer than a day: poll(2) takes an int of milliseconds, and the host's clock may have been set.
        return None if due is None else min(max(due - time.time(), 0), _DAY)

    def tick(self) -> None:
        """Let the devices see what has become due; those of a machine that is paused see it later."""
        if not self._paused:
            self._rtc.tick()

    def _join(self) -> None:
        for thread in self._threads:
            thread.join()
        self._resume_devices()
        self.console.flush()

    def close(self) -> None:
        """Stop it if it runs, and free everything. A second call does nothing, once the first has done so.

        Raises:
            OffmapError: this is a thread of its own.
        """
        self._refuse_own_threads("closed")
        self.stop(Outcome.QUIT)  # whoever waits for the vCPUs to pause waits no more
        with self._lifecycle:
            self._owned.close()
