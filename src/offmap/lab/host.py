"""A disposable host: a kernel under QEMU with this machine's files, in which commands run as root."""

import itertools
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from offmap.lab import accel as acceleration
from offmap.lab.access_plugin import plugin_argument
from offmap.lab.bytecode import ensure_bytecode
from offmap.lab.command import LabCommand, Sink
from offmap.lab.console import Console
from offmap.lab.errors import LabEnded, LabError, LabTimeout
from offmap.lab.guest.frames import HELLO, MAX_PAYLOAD, START, Decoder, Start, encode_start, frame
from offmap.lab.kernel import HostKernel
from offmap.lab.process import PANIC_GRACE, QemuProcess
from offmap.lab.qemu import HostOptions, parse_size
from offmap.owned import Owned

__all__ = ["Completed", "LabHost"]

BOOT_TIMEOUT = 120.0  # seconds; 3 are usual under emulation on an idle machine
HUNG_SECONDS = 30  # a host whose agent takes no frame for so long hangs
_TIMEVAL = struct.Struct("@ll")  # struct timeval


@dataclass(frozen=True)
class Completed:
    """A command that has ended: its exit status and what it wrote."""

    status: int
    stdout: bytes
    stderr: bytes


class LabHost(Owned):
    """A running disposable host; a context manager that ends it.

    Attributes:
        kernel: what it runs.
        options: what it is made of.
        release: ``uname -r`` in it, as it said itself.
        has_kvm: whether /dev/kvm exists in it.
        console: its kernel console.
    """

    def __init__(self, kernel: HostKernel, options: HostOptions, console: Console) -> None:
        self.kernel = kernel
        self.options = options
        self.console = console
        self.release = ""
        self.has_kvm = False
        self._qemu = QemuProcess(kernel, options, console, self._over)
        self._socket = self._qemu.socket
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(HUNG_SECONDS, 0))
        self._reader = threading.Thread(target=self._read, name="lab-agent", daemon=True)
        self._send_lock = threading.Lock()
        self._commands: dict[int, LabCommand] = {}
        self._channels = itertools.count(1)
        self._progress = threading.Condition()  # guards the three below
        self._ready = False
        self._failure: LabError | None = None

    @classmethod
    def start(
        cls,
        kernel: HostKernel,
        memory: str = "2G",
        cmdline: str = "",
        out: Path | None = None,
        accel: str = "auto",
        console: BinaryIO | None = None,
        on_boot: Callable[[str], None] | None = None,
        timeout: float = BOOT_TIMEOUT,
        nodes: int = 1,
        on_launch: Callable[[Self], None] | None = None,
        fresh: bool = False,
        access_log: Path | None = None,
    ) -> Self:
        """Boot a host and wait until it takes commands.

        Args:
            kernel: see `provision.host_kernel`.
            memory: its RAM, as QEMU writes sizes.
            cmdline: appended to its kernel command line, as it is.
            out: folder that its commands may write to and that survives it (``$OFFMAP_OUT``, at the same path).
            accel: ``tcg``, ``kvm``, or ``auto``: KVM where an ordinary kernel boots under it and has KVM itself.
            console: gets a copy of its kernel console.
            on_boot: called with each line of its console.
            timeout: seconds that the boot may take.
            nodes: NUMA nodes that share its RAM.
            on_launch: called with the host before its boot, for whoever must be able to `kill` it meanwhile.
            fresh: boot in full, whatever could save the boot. Today every host does.
            access_log: file to log its kernel's accesses to guests' RAM in (`access_log.AccessLog` reads it); the host
                is emulated then, boots in full, and is a third as fast.

        Raises:
            LabPanic, LabEnded, LabTimeout: the boot failed.
            LabError: it could not be started.
        """
        size = parse_size(memory)
        folder = out.resolve() if out is not None else None
        if folder is not None and not os.access(folder, os.W_OK | os.X_OK):
            raise LabError(f"the output folder {folder} is not a writable folder", "give another one with --out")
        plugin = ""
        if access_log is not None:
            if accel == "kvm" or nodes > 1:
                raise LabError(
                    "accesses can only be logged in an emulated host of one NUMA node", "leave the others out"
                )
            accel, plugin = "tcg", plugin_argument(access_log, size)
        if accel == "auto":
            accel = acceleration.choose(kernel, lambda: cls._works_under_kvm(kernel))
        options = HostOptions(size, cmdline, folder, accel, nodes, plugin)
        host = cls(kernel, options, Console(console, on_boot))
        try:
            if on_launch is not None:
                on_launch(host)
            host._boot(timeout)
        except BaseException:
            host.close()
            raise
        return host

    @classmethod
    def _works_under_kvm(cls, kernel: HostKernel) -> bool:
        """Boot a small host under KVM and see whether it gets as far as having KVM itself."""
        first_sign = threading.Event()

        def heard(line: str) -> None:
            if not line.startswith("qemu-system"):  # its warnings are no sign of life
                first_sign.set()

        options = HostOptions(parse_size("512M"), "earlyprintk=ttyS0", None, "kvm")
        host = cls(kernel, options, Console(None, heard))
        try:
            host._launch()
            if not first_sign.wait(acceleration.SIGN_OF_LIFE_SECONDS):
                return False
            host._await_ready(acceleration.PROBE_SECONDS)
            argv = [sys.executable, "-I", "-S", "-c", acceleration.NESTED_PROBE]
            return host.has_kvm and host.output(argv, timeout=acceleration.PROBE_SECONDS).status == 0
        except LabError:
            return False
        finally:
            host.close()

    def _boot(self, timeout: float) -> None:
        ensure_bytecode()
        self._launch()
        self._await_ready(timeout)

    def _launch(self) -> None:
        self._qemu.start()
        self._reader.start()

    def _over(self, failure: LabError) -> None:
        with self._progress:
            self._failure = self._failure or failure
            commands = list(self._commands.values())
            self._commands.clear()
            self._progress.notify_all()
        for command in commands:
            command.abandon()

    def _read(self) -> None:
        decoder = Decoder()
        while True:
            try:
                data = self._socket.recv(2 * MAX_PAYLOAD)
            except OSError:
                return
            if not data:
                return
            for kind, channel, payload in decoder.feed(data):
                if kind == HELLO:
                    self._hello(payload)
                    continue
                command = self._commands.get(channel)
                if command:
                    command.deliver(kind, payload)
                    if command.ended:
                        self._commands.pop(channel, None)

    def _hello(self, payload: bytes) -> None:
        facts = dict(word.split("=", 1) for word in payload.decode().split())
        with self._progress:
            self.release = facts.get("release", "")
            self.has_kvm = facts.get("kvm") == "1"
            self._ready = True
            self._progress.notify_all()

    def _await_ready(self, timeout: float) -> None:
        with self._progress:
            self._progress.wait_for(lambda: self._ready or self._failure is not None, timeout)
            if self._ready:
                return
            if self._failure:
                raise self._failure
        last = self.console.tail(1)
        raise LabTimeout(
            f"the lab host did not come up in {timeout:g} s (last on its console: {last!r})", "see --console FILE"
        )

    # For commands (the Link protocol).

    def send(self, kind: int, channel: int, payload: bytes = b"") -> None:
        """Send one frame; a host that is gone says so by `failure`, not here."""
        with self._send_lock:
            try:
                self._socket.sendall(frame(kind, channel, payload))
            except BlockingIOError:  # SO_SNDTIMEO
                self._over(LabEnded(f"the lab host hung for {HUNG_SECONDS} s and was ended", self.console.tail()))
                self.kill()
            except OSError:
                pass

    def failure(self) -> LabError:
        """Say why the host has ended; waits for the diagnosis if it is just ending."""
        with self._progress:
            self._progress.wait_for(lambda: self._failure is not None, PANIC_GRACE)
            return self._failure or LabEnded("the lab host is gone", self.console.tail())

    def kill(self) -> None:
        """End QEMU now."""
        self._qemu.kill()

    # For the user.

    def popen(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        stdin: bytes | int | None = None,
        stdout: Sink = 1,
        stderr: Sink = 2,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        keep_stdin: bool = False,
        terminal: tuple[int, int] | None = None,
    ) -> LabCommand:
        """Start a command as root, in a session of its own.

        Args:
            argv: program (looked up in the environment's PATH) and arguments.
            stdin: bytes, a descriptor to read from, or None for an empty input.
            stdout, stderr: a descriptor, or a callable that takes each piece; by default our own.
            env: its environment, by default ours; ``OFFMAP_LAB`` and ``OFFMAP_OUT`` are added.
            cwd: its folder, by default ours.
            keep_stdin: leave its input open for `LabCommand.write`.
            terminal: (rows, columns) of a terminal to give it; all output is then on ``stdout``.
        """
        environment = {**(os.environ if env is None else env), "OFFMAP_LAB": self.kernel.name}
        if self.options.out is not None:
            environment["OFFMAP_OUT"] = str(self.options.out)
        else:
            environment.pop("OFFMAP_OUT", None)
        words = [os.fsencode(word) for word in argv]
        if not words:
            raise LabError("no command to run", "write it after --")
        pairs = [os.fsencode(f"{name}={value}") for name, value in environment.items()]
        try:
            start = encode_start(Start(words, pairs, os.fsencode(cwd or Path.cwd()), terminal))
        except ValueError as error:
            raise LabError(f"cannot run {argv[0]!r}: {error}") from error
        command = LabCommand(self, next(self._channels), str(argv[0]), stdout, stderr, stdin, keep_stdin)
        with self._progress:
            gone = self._failure is not None
            if not gone:
                self._commands[command.channel] = command
        if gone:
            command.abandon()
            return command
        self.send(START, command.channel, start)
        command.begin()
        return command

    def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        stdin: bytes | int | None = None,
        stdout: Sink = 1,
        stderr: Sink = 2,
        timeout: float | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
    ) -> int:
        """Run a command to its end and return its exit status (see `popen` and `LabCommand.wait`)."""
        command = self.popen(argv, stdin=stdin, stdout=stdout, stderr=stderr, env=env, cwd=cwd)
        try:
            return command.wait(timeout)
        except KeyboardInterrupt:
            command.kill()
            raise

    def output(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        stdin: bytes | int | None = None,
        timeout: float | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
    ) -> Completed:
        """Run a command to its end and return what it wrote."""
        out, err = bytearray(), bytearray()
        status = self.run(argv, stdin=stdin, stdout=out.extend, stderr=err.extend, timeout=timeout, env=env, cwd=cwd)
        return Completed(status, bytes(out), bytes(err))

    def close(self) -> None:
        """End the host; what its commands wrote to the output folder has already left it."""
        self._over(LabEnded("the lab host was closed", ""))
        self._qemu.close()
        if self._reader.is_alive():
            self._reader.join()
        self._socket.close()
