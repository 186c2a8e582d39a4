"""A job in its own process (offmap.vmm.process), for programs: the guest's VMM is confined, the program is not."""

import os
import threading
from collections.abc import Callable

from offmap.errors import OffmapError
from offmap.guests.job import Job
from offmap.owned import Owned
from offmap.vmm import records
from offmap.vmm.config import MachineConfig
from offmap.vmm.machine import Machine
from offmap.vmm.process import VmProcess
from offmap.vmm.served import confined, ordered


class JobProcess(Owned):
    """One command in a guest, run by another process, which ends with this one.

    Args:
        command: for the guest's /bin/sh.
        files: fds of its input, output and errors.
        config: of a guest that boots an image.
        say: takes a line for the user, on another thread.
        waits: wait at the command's end for `run` to look at the guest.
        sandbox: confine the process.

    Raises:
        OffmapError: the process cannot be started.
    """

    def __init__(
        self,
        command: str,
        files: tuple[int, int, int],
        config: MachineConfig,
        *,
        say: Callable[[str], None],
        waits: bool,
        sandbox: bool,
    ) -> None:
        self._say = say
        self._changed = threading.Condition()
        self._done: records.Done | None = None
        self._is_ending = self._ended = False
        self._error: OffmapError | None = None
        order = command, files, config, waits, sandbox
        self._process = VmProcess("offmap.guests.job_process:work", order, self._hear, self._end, files)

    def run(self, look: Callable[[int], None]) -> int:
        """Wait for its end; call `look` with the process's id while the guest's RAM is still there, if it waits for it.

        Returns:
            The command's exit status, 0 to 255.

        Raises:
            OffmapError: the guest could not be made, or ended before the command did.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_ending or self._done is not None or self._ended)
        if self._is_ending:
            look(self._process.pid)
            self._process.send(records.Resume())
        with self._changed:
            self._changed.wait_for(lambda: self._ended)  # the memory is given back
        if self._done is None:
            raise self._error or OffmapError("the guest's process ended before the command did")
        if self._done.failure is not None:
            raise self._done.failure.error()
        return self._done.status & 0xFF

    def _hear(self, record: records.FromVm) -> None:
        if isinstance(record, records.Said):
            self._say(record.line)
            return
        with self._changed:
            if isinstance(record, records.Done):
                self._done = record
            self._is_ending = self._is_ending or isinstance(record, records.Ending)
            self._changed.notify_all()

    def _end(self, error: OffmapError | None) -> None:
        with self._changed:
            self._error = error
            self._ended = True
            self._changed.notify_all()

    def close(self) -> None:
        """End it if it runs, and wait until its memory is given back."""
        self._process.close()


def work() -> None:
    """Be that process."""
    program, (command, files, config, waits, sandbox) = ordered()
    for file in files:
        os.set_inheritable(file, False)  # it is ours

    def on_end(_machine: Machine) -> None:
        if waits:
            program.tell(records.Ending())
            program.hear()

    try:
        with confined(config, sandbox=sandbox) as confinement, Job(command, *files) as job:
            status = job.run(
                config,
                say=lambda line: program.tell(records.Said(line)),
                on_end=on_end,
                confinement=confinement,
            )
    except OffmapError as error:
        program.tell(records.Done(0, records.Failure.of(error)))
    else:
        program.tell(records.Done(status))
