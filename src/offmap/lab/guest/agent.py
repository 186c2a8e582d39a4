"""The agent in the disposable host: starts commands and carries their streams (frames.py) over a virtio-serial port.

It lives in the initramfs. It says WAITING when the host is up, and makes the root file system (root.py) at the GO: a
snapshot is taken in between. One thread, one epoll. It ends when the outer end is gone; the first process (first.py)
then powers the host off, so that no host outlives the process that asked for it.
"""

import errno
import fcntl
import os
import select
import signal
import struct
import sys
import termios
import time
import warnings  # noqa: F401 - execvpe() imports it, and must not look for it in the files that a command sees

from offmap.lab.guest import root
from offmap.lab.guest.frames import (
    ACK,
    EXIT,
    FAILED,
    GO,
    HELLO,
    MAX_PAYLOAD,
    RESIZE,
    SIGNAL,
    START,
    STDERR,
    STDIN,
    STDIN_EOF,
    STDOUT,
    WAITING,
    WINDOW,
    Decoder,
    Start,
    decode_start,
    frame,
    i32,
    to_i32,
)

TYPE_CHECKING = False  # as from typing, which is slow to import here
if TYPE_CHECKING:
    from collections.abc import Callable

PORT_TRIES = 4000  # the port and its "host is connected" message come milliseconds after boot
_READ = select.EPOLLIN
_WRITE = select.EPOLLOUT


class Output:
    """One output stream of a command, and how much of it may still be sent."""

    def __init__(self, kind: int, fd: int) -> None:
        self.kind = kind
        self.fd = fd
        self.credit = WINDOW
        self.at_end = False
        self.polled = False


class Command:
    """A running command and its pipes; with a terminal, its one fd is both input and output."""

    def __init__(self, channel: int, pid: int, stdin: int, outputs: list[Output]) -> None:
        self.channel = channel
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.stdin = stdin
        self.stdin_pending = bytearray()
        self.stdin_ending = False
        self.outputs = outputs
        self.status: int | None = None


class Agent:
    """Serves the port ``fd`` until its other end closes."""

    def __init__(self, fd: int) -> None:
        self.port = fd
        self.decoder = Decoder()
        self.unsent = bytearray()
        self.commands: dict[int, Command] = {}
        self.owners: dict[int, Command] = {}  # any fd of a command -> the command
        self.epoll = select.epoll()
        self.epoll.register(fd, _READ)
        self._input_polled: set[int] = set()
        self.on_go: Callable[[root.Settings], None] | None = None  # called once

    def serve(self) -> None:
        """Run until the outer end is gone."""
        while True:
            for fd, events in self.epoll.poll():
                if fd == self.port:
                    if events & (_READ | select.EPOLLHUP) and not self._receive():
                        return
                    if events & _WRITE:
                        self._flush()
                elif fd in self.owners:
                    self._command_event(self.owners[fd], fd, events)

    def send(self, kind: int, channel: int, payload: bytes = b"") -> None:
        """Queue a frame and send what the port takes now."""
        self.unsent += frame(kind, channel, payload)
        self._flush()

    def _flush(self) -> None:
        while self.unsent:
            try:
                written = os.write(self.port, self.unsent[:MAX_PAYLOAD])
            except BlockingIOError:
                break
            del self.unsent[:written]
        self.epoll.modify(self.port, _READ | (_WRITE if self.unsent else 0))

    def _receive(self) -> bool:
        try:
            data = os.read(self.port, 2 * MAX_PAYLOAD)
        except BlockingIOError:
            return True
        if not data:
            return False
        for kind, channel, payload in self.decoder.feed(data):
            self._dispatch(kind, channel, payload)
        return True

    def _dispatch(self, kind: int, channel: int, payload: bytes) -> None:
        if kind == START:
            self._start(channel, decode_start(payload))
            return
        if kind == GO and self.on_go is not None:
            go, self.on_go = self.on_go, None
            go(root.Settings(payload))
            return
        command = self.commands.get(channel)
        if command is None:  # it has ended in the meantime
            return
        if kind == STDIN:
            command.stdin_pending += payload
            self._feed(command)
        elif kind == STDIN_EOF:
            command.stdin_ending = True
            self._feed(command)
        elif kind == ACK:
            stream, taken = payload[0], to_i32(payload[1:])[0]
            for output in command.outputs:
                if output.kind == stream:
                    output.credit += taken
                    self._want_output(command, output)
            self._finish_if_done(command)
        elif kind == SIGNAL:
            try:  # noqa: SIM105 - importing contextlib costs 20 ms here
                os.killpg(command.pid, to_i32(payload)[0])
            except ProcessLookupError:
                pass
        elif kind == RESIZE and command.outputs:
            rows, columns = to_i32(payload)
            _set_size(command.outputs[0].fd, rows, columns)

    def _start(self, channel: int, start: Start) -> None:
        stdin_end: int
        outputs: list[Output]
        if start.terminal:
            master, slave = os.openpty()
            _set_size(slave, *start.terminal)
            child_fds = (slave, slave, slave)
            stdin_end, outputs = master, [Output(STDOUT, master)]
        else:
            pipes = [os.pipe() for _ in range(3)]
            child_fds = (pipes[0][0], pipes[1][1], pipes[2][1])
            stdin_end, outputs = pipes[0][1], [Output(STDOUT, pipes[1][0]), Output(STDERR, pipes[2][0])]
        report_read, report_write = os.pipe()  # closed by a successful exec, else it carries the errno
        pid = os.fork()
        if pid == 0:
            _exec(start, child_fds, report_write)
        for fd in {*child_fds, report_write}:
            os.close(fd)
        failure = os.read(report_read, 8)
        os.close(report_read)
        if failure:
            os.waitpid(pid, 0)
            for fd in {stdin_end, *(output.fd for output in outputs)}:
                os.close(fd)
            self.send(FAILED, channel, failure)
            return
        command = Command(channel, pid, stdin_end, outputs)
        self.commands[channel] = command
        for fd in {stdin_end, *(output.fd for output in outputs)}:
            os.set_blocking(fd, False)
            self.owners[fd] = command
        self.owners[command.pidfd] = command
        self.epoll.register(command.pidfd, _READ)
        for output in outputs:
            self._want_output(command, output)

    def _poll_for(self, fd: int, events: int, registered: bool) -> bool:
        """Register, change or drop the interest in ``fd``; return whether it is registered now."""
        if events and registered:
            self.epoll.modify(fd, events)
        elif events:
            self.epoll.register(fd, events)
        elif registered:
            self.epoll.unregister(fd)
        return bool(events)

    def _want_output(self, command: Command, output: Output) -> None:
        events = _READ if output.credit > 0 and not output.at_end else 0
        if command.stdin == output.fd and command.stdin_pending:
            events |= _WRITE
        output.polled = self._poll_for(output.fd, events, output.polled)

    def _command_event(self, command: Command, fd: int, events: int) -> None:
        if fd == command.pidfd:
            self.epoll.unregister(command.pidfd)
            command.status = os.waitstatus_to_exitcode(os.waitpid(command.pid, 0)[1])
            self._finish_if_done(command)
            return
        if fd == command.stdin and events & (_WRITE | select.EPOLLERR):
            self._feed(command)
        for output in command.outputs:
            if output.fd == fd and events & (_READ | select.EPOLLHUP | select.EPOLLERR):
                self._read_output(command, output)
                self._want_output(command, output)
        self._finish_if_done(command)

    def _read_output(self, command: Command, output: Output) -> bool:
        """Send one piece of a stream; return whether there may be more at once."""
        if output.at_end or output.credit <= 0:
            return False
        try:
            data = os.read(output.fd, min(MAX_PAYLOAD, output.credit))
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.EIO:  # EIO: the other side of a terminal is closed
                raise
            data = b""
        if not data:
            output.at_end = True
            return False
        output.credit -= len(data)
        self.send(output.kind, command.channel, data)
        return True

    def _feed(self, command: Command) -> None:
        """Write pending input; a command that closed its input loses the rest, as with any pipe."""
        if command.stdin < 0:
            return
        taken = 0
        try:
            while command.stdin_pending:
                written = os.write(command.stdin, command.stdin_pending[:MAX_PAYLOAD])
                del command.stdin_pending[:written]
                taken += written
        except BlockingIOError:
            pass
        except OSError:
            taken += len(command.stdin_pending)
            command.stdin_pending.clear()
            command.stdin_ending = True
        if taken:
            self.send(ACK, command.channel, bytes((STDIN,)) + i32(taken))
        self._want_input(command)

    def _want_input(self, command: Command) -> None:
        shared = next((output for output in command.outputs if output.fd == command.stdin), None)
        if shared:
            self._want_output(command, shared)
            return
        polled = command.stdin in self._input_polled
        if command.stdin_pending:
            if self._poll_for(command.stdin, _WRITE, polled):
                self._input_polled.add(command.stdin)
            return
        if polled:
            self.epoll.unregister(command.stdin)
            self._input_polled.discard(command.stdin)
        if command.stdin_ending:
            del self.owners[command.stdin]
            os.close(command.stdin)
            command.stdin = -1

    def _finish_if_done(self, command: Command) -> None:
        """Report the exit once all that the command had written by then is sent.

        A child it left behind may hold the pipes open for ever; that does not delay the report.
        """
        if command.status is None or command.channel not in self.commands:
            return
        for output in command.outputs:
            while self._read_output(command, output):
                pass
            if not output.at_end and output.credit <= 0:
                return  # its next acknowledgement brings us back
        del self.commands[command.channel]
        for fd in {command.stdin, command.pidfd, *(output.fd for output in command.outputs)} - {-1}:
            del self.owners[fd]
            self._input_polled.discard(fd)
            os.close(fd)  # which also takes it out of the epoll set
        self.send(EXIT, command.channel, i32(command.status))


def _oom_score_adj(value: int) -> None:
    """Say how likely the out-of-memory killer takes this process (proc(5)); -1000 is never."""
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:  # noqa: PTH123 - as does pathlib
            file.write(str(value))
    except PermissionError:  # not root: in tests of the agent itself
        pass


def _set_size(fd: int, rows: int, columns: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("<HHHH", rows, columns, 0, 0))


def _exec(start: Start, child_fds: tuple[int, int, int], report: int) -> None:
    """In the forked child: become the command, or report why not."""
    in_folder = 0
    try:
        for number in (signal.SIGPIPE, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        if start.terminal:
            os.login_tty(child_fds[0])
        else:
            os.setsid()
            for target, fd in enumerate(child_fds):
                os.dup2(fd, target)
        _oom_score_adj(0)
        os.chdir(start.cwd)
        in_folder = 1
        env = dict(string.split(b"=", 1) for string in start.env)
        os.execvpe(start.argv[0], start.argv, env)
    except OSError as error:
        os.write(report, i32(error.errno or errno.EIO, in_folder))
    finally:
        os._exit(127)


def _open_port(path: str) -> int:
    """Open the port once it exists and its other end is connected."""
    for _ in range(PORT_TRIES):
        try:
            fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            poll = select.poll()
            poll.register(fd, select.POLLOUT)
            if not any(events & select.POLLHUP for _, events in poll.poll(0)):
                return fd
            os.close(fd)
        except FileNotFoundError:
            pass
        # The driver signals neither the node nor the connection to one who has not opened it yet.
        time.sleep(0.005)
    sys.exit(f"offmap-lab: no connection on {path}")


def main(path: str, made: int, moved: int) -> None:
    """Serve the port at ``path``; return when the outer end is gone.

    Args:
        path: the port.
        made: gets a byte when the root file system is made.
        moved: gives a byte when it is in its place.
    """
    # A command may use up all memory; without its agent the host could not even say so.
    _oom_score_adj(-1000)
    agent = Agent(_open_port(path))
    agent.send(WAITING, 0)

    def go(settings: root.Settings) -> None:
        """Set this host up, and announce that it takes commands."""
        root.personalize(settings)
        root.make(settings)
        new_root = os.open(root.NEW, os.O_PATH | os.O_CLOEXEC)
        os.write(made, b"x")
        if not os.read(moved, 1):
            raise OSError("the first process has ended")
        os.fchdir(new_root)
        os.chroot(".")
        os.close(new_root)
        kvm = int(os.path.exists("/dev/kvm"))  # noqa: PTH110 - pathlib is 30 ms of imports in an emulated host
        agent.send(HELLO, 0, f"release={os.uname().release} kvm={kvm} token={settings.token}".encode())

    agent.on_go = go
    agent.serve()
