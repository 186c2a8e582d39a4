"""A disposable host: a kernel under QEMU with this machine's files, in which commands run as root."""

import itertools
import os
import secrets
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from offmap.lab import accel as acceleration
from offmap.lab.access_plugin import plugin_argument
from offmap.lab.bytecode import ensure_bytecode
from offmap.lab.command import Completed, LabCommand, Sink, start_message
from offmap.lab.console import Console
from offmap.lab.errors import LabEnded, LabError, LabTimeout
from offmap.lab.guest.frames import GO, HELLO, START, WAITING, Decoder, frame
from offmap.lab.initramfs import initramfs
from offmap.lab.kernel import HostKernel
from offmap.lab.port import AgentPort
from offmap.lab.process import PANIC_GRACE, QemuProcess, settings
from offmap.lab.qemu import HostOptions, Ram, parse_size
from offmap.lab.qmp import Qmp, QmpError
from offmap.lab.snapshot import SnapshotUnusable
from offmap.lab.snapshot_start import from_snapshot, restore, save
from offmap.log import Logger
from offmap.owned import Owned
from offmap.patience import TICK, Deadline, Watch, calibration, processor_seconds, scaled

QMP_SECONDS = 60.0  # that saving or restoring may take; a second is usual

_log = Logger("offmap.lab")


class LabHost(Owned):
    """A running disposable host; a context manager that ends it.

    Attributes:
        kernel: what it runs.
        options: what it is made of.
        release: ``uname -r`` in it, as it said itself.
        has_kvm: whether /dev/kvm exists in it.
        console: its kernel console.
    """

    def __init__(self, kernel: HostKernel, options: HostOptions, console: Console, ram: Ram | None = None) -> None:
        self.kernel = kernel
        self.options = options
        self.console = console
        self.release = ""
        self.has_kvm = False
        self._qemu = QemuProcess(kernel, options, console, self._over, ram)
        self._port = AgentPort(self._qemu.socket, self._watch)
        self._reader = threading.Thread(target=self._read, name="lab-agent", daemon=True)
        self._commands: dict[int, LabCommand] = {}
        self._channels = itertools.count(1)
        self._frames = 0  # that have come so far
        self._token = secrets.token_hex(8)
        self._progress = threading.Condition()  # guards the four below
        self._waiting = False
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
        timeout: float | None = None,
        nodes: int = 1,
        on_launch: Callable[["LabHost"], None] | None = None,
        fresh: bool = False,
        access_log: Path | None = None,
        devices: tuple[str, ...] = (),
    ) -> "LabHost":
        """Start a host, from a snapshot where there can be one, and wait until it takes commands.

        Args:
            kernel: see `provision.host_kernel`.
            memory: its RAM, as QEMU writes sizes.
            cmdline: appended to its kernel command line, as it is.
            out: folder that its commands may write to and that survives it (``$OFFMAP_OUT``, at the same path).
            accel: ``tcg``, ``kvm``, or ``auto``: KVM where an ordinary kernel boots under it and has KVM itself.
                ``icount``: emulated, and its clocks count instructions.
            console: gets a copy of its kernel console.
            on_boot: called with each line of its console.
            timeout: seconds that the start may take; by default as long as the host makes progress.
            nodes: NUMA nodes that share its RAM.
            on_launch: called with the host before its start, so that the caller can `kill` it meanwhile; more than once
                where the host that boots is not the one that is returned.
            fresh: boot in full. Hosts from one snapshot have the same kernel layout and allocator state (docs/lab.md).
            access_log: file to log its kernel's accesses to guests' RAM in (`access_log.AccessLog` reads it); the host
                is emulated then, boots in full, and is a quarter as fast.
            devices: more arguments for QEMU, as they are.

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
            if accel not in ("auto", "tcg") or nodes > 1:
                raise LabError(
                    "accesses can only be logged in an emulated host of one NUMA node", "leave the others out"
                )
            accel, plugin = "tcg", plugin_argument(access_log, size)
        if accel == "auto":
            accel = acceleration.choose(kernel, lambda: cls._works_under_kvm(kernel))
        options = HostOptions(size, cmdline, folder, accel, nodes, plugin, devices)
        shown = Console(console, on_boot)
        ends = None if timeout is None else Deadline(timeout)
        archive = initramfs(kernel)

        def new(ram: Ram | None = None) -> LabHost:
            host = cls(kernel, options, shown, ram)
            if on_launch is not None:
                on_launch(host)
            return host

        ensure_bytecode()
        _log.debug("%s", calibration())
        if not fresh and not plugin:
            try:
                return from_snapshot(kernel, options, archive, shown, new, ends)
            except SnapshotUnusable as why:
                _log.debug("%s boots in full: %s", kernel.release, why.what)
        host = new()
        try:
            host.boot(archive.archive(), ends)
            host.go(ends)
        except BaseException:
            host.close()
            raise
        return host

    @classmethod
    def _works_under_kvm(cls, kernel: HostKernel) -> bool:
        """Boot a small host under KVM and see whether it gets as far as having KVM itself."""
        signs: list[str] = []

        def heard(line: str) -> None:
            if not line.startswith("qemu-system"):  # its warnings are no sign of life
                with host._progress:
                    signs.append(line)
                    host._progress.notify_all()

        options = HostOptions(parse_size("512M"), "earlyprintk=ttyS0", None, "kvm")
        host = cls(kernel, options, Console(None, heard))
        try:
            host._launch(initramfs(kernel).archive())
            with host._progress:  # many QEMUs end at once where KVM is not whole
                begun = host._progress.wait_for(
                    lambda: signs or host._failure, scaled(acceleration.SIGN_OF_LIFE_SECONDS)
                )
            if not begun:
                return False
            ends = Deadline(scaled(acceleration.PROBE_SECONDS))
            host._await(lambda: host._waiting, "its kernel", ends)
            host.go(ends)
            argv = [sys.executable, "-I", "-S", "-c", acceleration.NESTED_PROBE]
            return host.has_kvm and host.output(argv, timeout=scaled(acceleration.PROBE_SECONDS)).status == 0
        except LabError:
            return False
        finally:
            host.close()

    # For from_snapshot (its Host protocol).

    def boot(self, archive: bytes, ends: Deadline | None) -> None:
        """Boot the kernel with the initramfs ``archive``, to where it waits for its GO."""
        self._launch(archive)
        self._await(lambda: self._waiting, "its kernel", ends)

    def save(self, state: int) -> None:
        """Stop the host, write its devices' state to the descriptor ``state``, and end it."""
        with self._qmp() as qmp:
            save(qmp, state)
        self.close()

    def restore(self, state: int) -> None:
        """Start QEMU with the devices' state from the descriptor ``state``."""
        self._launch(b"")
        with self._qmp() as qmp:
            restore(qmp, state)

    def go(self, ends: Deadline | None) -> None:
        """Tell the host, which waits, what differs from host to host; wait until it takes commands."""
        self.send(GO, 0, settings(self.kernel, self.options, self._token))
        self._await(lambda: self._ready, "its root file system", ends)

    def _qmp(self) -> Qmp:
        if self._qemu.qmp_socket is None:
            raise QmpError("this host has no QMP")
        return Qmp(self._qemu.qmp_socket, scaled(QMP_SECONDS))

    def _launch(self, archive: bytes) -> None:
        self._qemu.start(archive)
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
            data = self._port.receive()
            if not data:
                return
            for kind, channel, payload in decoder.feed(data):
                self._frames += 1
                if kind == WAITING:
                    with self._progress:
                        self._waiting = True
                        self._progress.notify_all()
                    continue
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
            self._ready = self._port.nudges = facts.get("token") == self._token
            self._progress.notify_all()

    def _watch(self) -> Watch:
        return Watch(lambda: self._qemu.pid, lambda: self.console.fed + self._frames)

    def _await(self, reached: Callable[[], bool], what: str, ends: Deadline | None) -> None:
        """Wait for a stage of the start as long as the host makes progress, at most until ``ends``."""
        watch, limit = self._watch(), ""
        with self._progress:
            while not reached():
                if self._failure:
                    raise self._failure
                left = TICK if ends is None else min(TICK, ends.left)
                if self._progress.wait_for(lambda: reached() or self._failure is not None, left):
                    continue
                why = watch.stuck()
                if ends is not None and not ends.left:
                    limit = f" in {ends.seconds:g} s"
                    why = why or f"it used {watch.spun:.1f} s of processor time since its last word"
                elif not why:
                    continue
                raise LabTimeout(
                    f"the lab host did not come up{limit}: waited for {what}; {why};"
                    f" last on its console: {self.console.tail(1)!r}",
                    "see --console FILE",
                )

    # For commands (the Link protocol).

    def send(self, kind: int, channel: int, payload: bytes = b"") -> None:
        """Send one frame; a host that is gone says so by `failure`, not here."""
        if why := self._port.send(frame(kind, channel, payload)):
            self._over(LabEnded(f"the lab host hung and was ended: {why}", self.console.tail()))
            self.kill()

    def failure(self) -> LabError:
        """Say why the host has ended; waits for the diagnosis if it is just ending."""
        with self._progress:
            self._progress.wait_for(lambda: self._failure is not None, scaled(PANIC_GRACE))
            return self._failure or LabEnded("the lab host is gone", self.console.tail())

    def doing(self) -> str:
        """Say how much QEMU has run, and what the console said last."""
        used = processor_seconds(self._qemu.pid)
        return f"its host has used {used:.0f} s of processor time; last on its console: {self.console.tail(1)!r}"

    def kill(self) -> None:
        """End QEMU now, or as soon as it starts."""
        self._qemu.kill()

    @property
    def killed(self) -> bool:
        """Whether `kill` was called."""
        return self._qemu.killed

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
        environment.pop("OFFMAP_OUT", None)
        if self.options.out is not None:
            environment["OFFMAP_OUT"] = str(self.options.out)
        start = start_message(argv, environment, cwd, terminal)
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
        self._qemu.socket.close()
