"""One command in a guest. It has our input and output, byte for byte, and we get its exit status.

The guest's init (init.sh) finds the command in a second cpio archive behind its own, /exec, and its standard streams
and a place for the status at four ports of a virtio console. It runs the command by itself, without systemd.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from offmap.devices.virtio.console import ConsoleSpec
from offmap.devices.virtio.console_port import Port
from offmap.errors import KernelError, OffmapError
from offmap.files import FileName
from offmap.lab.cpio import newc, regular
from offmap.owned import Owned
from offmap.vmm.config import MachineConfig
from offmap.vmm.headless import Headless
from offmap.vmm.machine import Machine
from offmap.vmm.outcome import Outcome
from offmap.vmm.output import reopened

if TYPE_CHECKING:
    from offmap.vmm.confinement import Confinement

MAX_COMMAND = (1 << 17) - 1  # MAX_ARG_STRLEN, linux/binfmts.h, less its end
_STATUS = re.compile(rb"exit (\d{1,3})\n")


class Job(Owned):
    """One command, to be run once.

    Args:
        command: for the guest's /bin/sh.
        stdin, stdout, stderr: fds, which stay the caller's.

    Raises:
        OffmapError: it is no command that can be handed over.
    """

    def __init__(self, command: str, stdin: int = 0, stdout: int = 1, stderr: int = 2) -> None:
        self._command = os.fsencode(command)
        if not self._command.strip() or b"\0" in self._command or len(self._command) > MAX_COMMAND:
            raise OffmapError(
                "--exec takes a command for the guest's shell, of at most 128 KiB", "put a longer one into its input"
            )
        self._fds: list[int] = []
        self._status, self._status_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._fds += [self._status, self._status_end]
        self._initrd = os.memfd_create("offmap-initrd")
        self._fds.append(self._initrd)
        self._stdin = stdin
        self._outputs = {"stdout": self._reopened(stdout), "stderr": self._reopened(stderr)}
        self._headless: Headless | None = None

    def _reopened(self, fd: int) -> int:
        """The file opened again, without blocking: a slow reader then stops the guest's writer, and no thread here."""
        opened = reopened(fd)
        if opened != fd:
            self._fds.append(opened)
        return opened

    def run(
        self,
        config: MachineConfig,
        *,
        say: Callable[[str], None],
        on_up: Callable[[Machine], None] = lambda _: None,
        on_end: Callable[[Machine], None] = lambda _: None,
        confinement: "Confinement | None" = None,
    ) -> int:
        """Run it in a guest of `config`, which boots an image.

        Returns:
            The command's exit status, 0 to 255; 128 and more where a signal ended it, as the shell has it.

        Raises:
            OffmapError: the guest could not be made, or ended before the command did.
        """
        ports = (
            Port("stdin", input=self._stdin),
            *(Port(name, output=fd, on_error=self._output_failed(name)) for name, fd in self._outputs.items()),
            Port("status", output=self._status_end, last=True),
        )
        config = config.replace(
            source=config.source._replace(initrd=self._compose_initrd(config.source.initrd)),
            devices=[*config.devices, ("exec", ConsoleSpec(ports))],
        )

        def is_up(machine: Machine) -> None:
            os.ftruncate(self._initrd, 0)  # the guest has read it
            on_up(machine)

        self._headless = Headless(config, self._status, say=say, on_up=is_up, on_end=on_end, confinement=confinement)
        stop = self._headless.run()
        if stop.error is not None:
            raise stop.error
        status = self._read_status()
        if status is None:
            how = "reset itself" if stop.outcome is Outcome.RESET else "ended"
            last = self._headless.last_words
            raise OffmapError(
                f"the guest {how} before the command did{f' (its console: {last})' if last else ''}",
                "give it more with --memory-size, or run it without --exec to see its console",
            )
        return status

    def _output_failed(self, name: str) -> Callable[[OSError], None]:
        def fail(error: OSError) -> None:
            if self._headless is not None:
                self._headless.fail(KernelError(f"writing the command's {name}", error))

        return fail

    def _compose_initrd(self, initrd: FileName | None) -> str:
        if initrd is None:
            raise OffmapError("a command can only be run in an image", "give --image")
        try:
            with Path(initrd).open("rb") as source, os.fdopen(os.dup(self._initrd), "wb") as target:
                size = os.fstat(source.fileno()).st_size
                done = 0
                while done < size and (sent := os.sendfile(target.fileno(), source.fileno(), done, size - done)):
                    done += sent
                os.lseek(target.fileno(), 0, os.SEEK_END)
                target.write(bytes(-done % 4) + newc([regular("exec", self._command)]))
        except OSError as error:
            raise KernelError(f"reading the initrd {initrd}", error) from None
        return f"/proc/self/fd/{self._initrd}"

    def _read_status(self) -> int | None:
        try:
            match = _STATUS.match(os.read(self._status, 64))
        except BlockingIOError:
            return None
        return int(match[1]) if match and int(match[1]) <= 255 else None

    def close(self) -> None:
        """Close the job's own files."""
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
