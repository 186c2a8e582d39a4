"""In a VM's process (process.py): the machine, confined, which obeys the program that started it.

The program's end is this process's: the kernel kills it then, whatever its guest has made of it.
"""

import contextlib
import ctypes
import os
import pickle
import select
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from offmap.errors import OffmapError
from offmap.uapi import seccomp as uapi
from offmap.vmm import records
from offmap.vmm.config import MachineConfig
from offmap.vmm.confinement import Confinement
from offmap.vmm.machine import Machine
from offmap.vmm.outcome import Outcome, Stop
from offmap.vmm.stop_signals import stopped_by_signals
from offmap.vmm.waiting import Waiting


class Program:
    """The program that started this process.

    Args:
        fd: our end of the socket pair.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def tell(self, record: records.FromVm) -> None:
        """Tell it something, on any thread. Nothing happens if it has gone."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            os.write(self.fd, records.encode(record))

    def output(self, data: bytes) -> None:
        """Hand on what the guest has written to its console."""
        for at in range(0, len(data), records.MOST_OUTPUT):
            self.tell(records.Output(data[at : at + records.MOST_OUTPUT]))

    def hear(self) -> records.ToVm | None:
        """Wait for what it says; None: it has gone."""
        try:
            data = os.read(self.fd, records.MOST)
        except ConnectionResetError:
            data = b""
        return records.decode_to_vm(data) if data else None


def ordered() -> tuple[Program, Any]:  # an order is what its entry point takes: pickled, and not checked
    """Return who started this process, and what it ordered. From now on this process ends with it."""
    ctypes.CDLL(None).prctl(uapi.PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    program, starter = int(sys.argv[1]), int(sys.argv[2])
    if os.getppid() != starter:
        sys.exit(1)  # it has ended already
    os.set_inheritable(program, False)
    order = pickle.load(sys.stdin.buffer)  # of the program that started us, whose rights we have
    return Program(program), order


@contextlib.contextmanager
def confined(config: MachineConfig, *, sandbox: bool) -> Iterator[Confinement | None]:
    """Give what confines this process, and the broker that `config`'s memory is kept by; None where there is none."""
    if not sandbox:
        yield None
        return
    with Confinement(lambda _pid: None, lambda _wait: None) as confinement:
        config.backend.keeper = confinement.broker
        yield confinement


def facts(machine: Machine) -> records.RamFacts:
    """What is known of the RAM of a machine."""
    ram = machine.ram
    known = {"size": ram.memory.size, "populate_seconds": ram.populate_seconds, **ram.to_json()}
    return msgspec.convert(known, records.RamFacts)


class _Served:
    """The loop of a machine that obeys a program."""

    def __init__(self, program: Program, config: MachineConfig) -> None:
        self._program = program
        self._config = config
        self._machine: Machine | None = None
        self._typed = b""  # what the guest has not taken yet
        self._leaving = False

    def run(self, confinement: Confinement | None) -> None:
        """Build it, and obey until the program has enough of it."""
        self._events = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        with (
            stopped_by_signals(self._leave) as signals,
            Machine(
                self._config,
                self._program.output,
                on_open=lambda: self._program.tell(records.Opened()),
                on_event=lambda: os.eventfd_write(self._events, 1),
                say=lambda line: self._program.tell(records.Said(line)),
            ) as machine,
        ):
            self._machine = machine
            self._program.tell(records.Built(facts(machine)))
            waiting = Waiting(machine, confinement, signals, self._events, self._program.fd)
            while machine.stopped is None and not self._leaving:
                self._turn(machine, confinement, waiting.wait())
            machine.stop(Outcome.QUIT)
            end = machine.stopped or Stop(Outcome.QUIT)
            machine.console.flush()
            failure = None if end.error is None else records.Failure.of(end.error)
            self._program.tell(records.Stopped(end.outcome, failure))
            poll = select.poll()  # for its RAM is there until the program has enough of it
            poll.register(self._program.fd, select.POLLIN)
            poll.register(self._events, select.POLLIN)
            poll.register(signals, select.POLLIN)
            while not self._leaving:
                self._turn(machine, confinement, {fd for fd, _ in poll.poll()})

    def _leave(self, reason: OffmapError) -> bool:
        """A signal has come: end the machine, and then this process."""
        if self._machine is None:
            return False
        self._leaving = True
        self._machine.stop(Outcome.QUIT, reason)
        return True

    def _turn(self, machine: Machine, confinement: Confinement | None, ready: set[int]) -> None:
        if self._events in ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._events)
            machine.console.flush(wait=False)
        if self._program.fd in ready:
            record = self._program.hear()
            if record is None:
                self._leaving = True
            else:
                self._obey(machine, confinement, record)
        if self._typed and (taken := machine.console.feed(self._typed)):
            self._typed = self._typed[taken:]
            self._program.tell(records.Taken(taken))
        machine.tick()

    def _obey(self, machine: Machine, confinement: Confinement | None, record: records.ToVm) -> None:
        match record:
            case records.Typed(data):
                self._typed += data
            case records.Halt():
                machine.stop(Outcome.QUIT)
            case records.Start():
                self._answer(machine, lambda: machine.start(confinement))
            case records.Pause():
                self._answer(machine, machine.pause)
            case records.Resume():
                self._answer(machine, machine.resume)

    def _answer(self, machine: Machine, do: Callable[[], object]) -> None:
        failure: records.Failure | None = None
        try:
            do()
        except OffmapError as error:
            failure = records.Failure.of(error)
        self._program.tell(records.Answered(machine.stopped is None, failure))


def serve() -> None:
    """Run a machine, by order (config, sandbox) of a program."""
    program, (config, sandbox) = ordered()
    try:
        with confined(config, sandbox=sandbox) as confinement:
            _Served(program, config).run(confinement)
    except OffmapError as error:
        program.tell(records.Stopped(Outcome.FAILED, records.Failure.of(error)))
