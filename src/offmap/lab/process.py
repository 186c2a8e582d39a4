"""QEMU as a process: started, its console taken, its end diagnosed; never outlives this process."""

import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import offmap
from offmap.lab.console import Console, panic_report
from offmap.lab.errors import LabEnded, LabError, LabPanic
from offmap.lab.kernel import HostKernel
from offmap.lab.qemu import HostOptions, Ram, command_line, find_qemu
from offmap.lab.tsc import tsc_khz
from offmap.log import Logger
from offmap.patience import scaled

_log = Logger("offmap.lab")

PANIC_GRACE = 5.0  # seconds from the panic's first line to the end of QEMU, before it is ended by force
MOUNTED_OVER = ("/proc", "/sys", "/dev", "/run")  # what a lab host has of its own


def settings(kernel: HostKernel, options: HostOptions, token: str) -> bytes:
    """Return the GO of a host that starts now (guest/root.py has its form).

    Raises:
        LabError: a file that the host needs lies below a mount point of the host's own.
    """
    source = Path(offmap.__file__).resolve().parent.parent
    for path in (source, Path(sys.executable), options.out):
        if path is not None and str(path).startswith(tuple(f"{prefix}/" for prefix in MOUNTED_OVER)):
            raise LabError(
                f"{path} cannot be seen in a lab host, which has its own /{path.parts[1]}", "move it elsewhere"
            )
    facts = {
        "modules": str(kernel.modules.resolve()),
        "out": str(options.out or ""),
        "name": f"offmap-lab-{secrets.token_hex(3)}",
        "entropy": secrets.token_hex(256),
        "token": token,
        "time": str(time.time_ns()),
    }
    return b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in facts.items())


def diagnose(console: Console, status: int) -> LabError:
    """Say why QEMU ended, from what the console showed and its exit status (negative for a signal)."""
    text = console.text
    if report := panic_report(text):
        return LabPanic(report)
    own = [line for line in text.splitlines() if line.startswith(("offmap-lab:", "qemu-system"))]
    if own:
        return LabEnded(f"the lab host could not run: {own[-1]}", console.tail())
    how = f"QEMU was killed by signal {-status}" if status < 0 else f"QEMU ended with status {status}"
    return LabEnded(f"the lab host ended by itself ({how}): it was powered off or reset", console.tail())


class QemuProcess:
    """One QEMU.

    Args:
        kernel, options: what to run in it.
        console: gets its console, and its own messages.
        on_end: called once, from another thread, with the reason when it has ended.
        ram: files that hold its RAM, for a host that is saved or restored; it then has QMP.

    Attributes:
        killed: whether `kill` was called, perhaps before the start.
        socket: our end of the agent's port.
        qmp_socket: our end of QMP's, for a host that has it.
    """

    def __init__(
        self,
        kernel: HostKernel,
        options: HostOptions,
        console: Console,
        on_end: Callable[[LabError], None],
        ram: Ram | None = None,
    ) -> None:
        self._kernel = kernel
        self._ram = ram
        self._options = options
        self._console = console
        self._on_end = on_end
        self._process: subprocess.Popen[bytes] | None = None
        self.killed = False
        self.socket, agent_end = socket.socketpair()
        self._its_sockets = [agent_end]
        self.qmp_socket: socket.socket | None = None
        if ram is not None:
            self.qmp_socket, qmp_end = socket.socketpair()
            self._its_sockets.append(qmp_end)
        self._started = threading.Event()
        self._error: OSError | None = None
        # QEMU is the child of a thread that lives as long as it does: its death signal is tied to that thread.
        self._keeper: threading.Thread | None = None

    def start(self, archive: bytes) -> None:
        """Start QEMU.

        Args:
            archive: the initramfs; may be empty for a host that is restored.

        Raises:
            LabError: it, or what it needs, is missing.
        """
        qemu = find_qemu()
        self._keeper = threading.Thread(target=self._keep, args=(qemu, archive), name="lab-qemu", daemon=True)
        self._keeper.start()
        self._started.wait()
        if self._error:
            raise LabError(f"cannot start {qemu}: {self._error.strerror}")

    @property
    def pid(self) -> int | None:
        """Its process id; None before its start."""
        return self._process.pid if self._process is not None else None

    def kill(self) -> None:
        """End QEMU now, or as soon as it starts; its console is still read to the end."""
        self.killed = True
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """End QEMU and wait until nothing of it is left."""
        self.kill()
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        if self._keeper:
            self._keeper.join()
        self._close_its_sockets()
        if self.qmp_socket is not None:
            self.qmp_socket.close()

    def _close_its_sockets(self) -> None:
        for end in self._its_sockets:
            end.close()

    def _keep(self, qemu: str, archive: bytes) -> None:
        """Start QEMU, take its console until it ends, and say why it did."""
        try:
            console = self._spawn(qemu, archive)
        except OSError as error:
            self._error = error
            return
        finally:
            self._close_its_sockets()
            self._started.set()
        timer: threading.Timer | None = None
        with os.fdopen(console, "rb", buffering=0) as stdout:
            while data := stdout.read(65536):
                if self._console.feed(data) and timer is None:
                    timer = threading.Timer(scaled(PANIC_GRACE), self.kill)
                    timer.daemon = True
                    timer.start()
        status = self._process.wait() if self._process else 0
        if timer:
            timer.cancel()
        self._on_end(diagnose(self._console, status))

    def _spawn(self, qemu: str, archive: bytes) -> int:
        """Start QEMU and return the descriptor on which its console comes."""
        initrd = os.memfd_create("offmap-initramfs")  # nothing to clean up, however we end
        console, console_end = os.pipe()
        try:
            with os.fdopen(os.dup(initrd), "wb") as file:
                file.write(archive)
            ends = [end.fileno() for end in self._its_sockets]
            image, archive_path = str(self._kernel.vmlinuz), f"/proc/self/fd/{initrd}"
            khz = tsc_khz() if archive and self._options.accel == "tcg" else None
            qmp_end = ends[1] if len(ends) > 1 else None
            argv = command_line(qemu, image, archive_path, ends[0], self._options, self._ram, qmp_end, khz)
            # A kill -9 of this process kills QEMU too; setpriv is in util-linux. Without it, the agent sees the end
            # of its socket and powers the host off.
            if setpriv := shutil.which("setpriv"):
                argv = [setpriv, "--pdeathsig", "KILL", *argv]
            _log.debug("%s", shlex.join(argv))
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=console_end,
                stderr=subprocess.STDOUT,
                pass_fds=(initrd, *ends, *(self._ram.fds if self._ram is not None else ())),
                start_new_session=True,
            )
            if self.killed:
                self._process.kill()
        except OSError:
            os.close(console)
            raise
        finally:
            os.close(initrd)
            os.close(console_end)
        return console
