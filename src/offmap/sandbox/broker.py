"""The broker: a small process beside the VMM, which keeps what the VMM must not have once its guest runs.

It is forked off before the VMM has anything of a guest. It holds the lock on a guest's reserved memory until the VMM's
process has ended, whatever that says: a mapping needs no descriptor. It zeroes the memory if the VMM has not. It
connects vsock ports, starts the audit, and says what the VMM has to say. It looks at nothing of the guest's. Requests
are records of a socket pair, each of one size at most; descriptors go to it only before `seal`, and later only to the
VMM. It ends with the VMM, and the VMM with it.
"""

# Python's own `socket` takes some milliseconds to import, for names that are not needed here.
import _socket
import contextlib
import errno
import mmap
import os
import select
import signal
import struct
import sys
import threading
from collections.abc import Callable, Sequence

from offmap.log import ERROR, Logger
from offmap.owned import Owned
from offmap.sandbox.seccomp import SIGINFO_SIZE, SIGINFO_SYSCALL_AT
from offmap.sandbox.terminal import Terminal
from offmap.typed import TYPE_CHECKING, NamedTuple
from offmap.uapi.syscall import name_of
from offmap.units import printable

if TYPE_CHECKING:
    import socket

_REQUEST = struct.Struct("<IIQQ")  # kind, a number, two more; a text or a siginfo follows
_MOST_TEXT = 2048
_LOG, _CONNECT, _AUDIT, _VERDICT, _KEEP_RANGE, _KEEP_FOLDER, _KEEP_CHILD, _ZEROED, _SEAL = range(100, 109)
_SIGSYS = int(signal.SIGSYS)
_NO_STATUS = 0xFFFFFFFF
_GRACE = 10_000  # milliseconds for a VMM that has closed its end to end itself
_CHILD_GRACE = 2_000  # milliseconds for one of its children, which are told by its end


class Services(NamedTuple):
    """What the broker does for its VMM beside what it keeps.

    Attributes:
        connect: a connection to a host's program, by (folder, name of the socket file); raises OSError.
        audit: starts an audit of a process.
        verdict: ends it and returns its exit status, or None; waits for it if asked to.
    """

    connect: "Callable[[int, str], socket.socket]"
    audit: Callable[[int], None]
    verdict: Callable[[bool], int | None]


class Broker(Owned):
    """The VMM's end.

    Attributes:
        fd: hangs up when the broker has ended.
        pid: of the broker.
    """

    def __init__(self, services: Services) -> None:
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
        vmm = os.getpid()
        terminal = Terminal(0) if os.isatty(0) else None  # now, as the VMM changes it
        self.pid = os.fork()
        if self.pid == 0:
            try:
                ours.close()
                os._exit(_Broker(theirs, vmm, services, terminal).serve())
            except BaseException:
                os._exit(2)
        theirs.close()
        self._socket = ours
        self.fd = ours.fileno()
        self._lock = threading.RLock()
        self._outlives = False  # it waits for our end, and we not for its

    def keep_range(self, lock: int, start: int, size: int) -> None:
        """Hand over the locked file of a range of physical memory (/dev/mem)."""
        self._ask(_KEEP_RANGE, 0, start, size, fds=[lock])
        self._outlives = True

    def keep_folder(self, folder: int, name: str) -> None:
        """Hand over the folder of a vsock's sockets, and the name that they begin with."""
        self._ask(_KEEP_FOLDER, 0, text=name, fds=[folder])

    def keep_child(self, pidfd: int) -> None:
        """Hand over a process that is to end with the VMM."""
        self._ask(_KEEP_CHILD, 0, fds=[pidfd])

    def seal(self) -> None:
        """From now on it takes no descriptors, and keeps no more than it has."""
        self._ask(_SEAL, 0)

    def zeroed(self) -> None:
        """The VMM has zeroed its memory. The locks go once its process has ended."""
        self._ask(_ZEROED, 0)

    def connect(self, folder: int, port: int) -> "socket.socket":
        """A connection to the program that listens at `port` of vsock number `folder`. Raises OSError: nobody does."""
        with self._lock:
            status, fds = self._ask_for_fds(_CONNECT, folder, port)
        if not fds:
            raise OSError(status or errno.ECONNREFUSED, os.strerror(status or errno.ECONNREFUSED))
        import socket  # which vsock has imported

        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fds[0])
        client.setblocking(False)
        return client

    def audit(self) -> None:
        """Start an audit of this process."""
        self._ask(_AUDIT, 0)

    def verdict(self, *, wait: bool) -> int | None:
        """End the audit. Return its exit status, or None if it had come to no verdict."""
        status = self._ask(_VERDICT, int(wait))
        return None if status == _NO_STATUS else status

    def log(self, level: int, name: str, message: str) -> None:
        """Log it there: what that needs is not in this process. If it has ended, nobody hears it, and the VMM ends."""
        with contextlib.suppress(OSError):
            self._ask(_LOG, level, text=f"{name}\0{message}")

    def _ask(self, kind: int, number: int, *more: int, text: str = "", fds: Sequence[int] = ()) -> int:
        # Names of files need not be UTF-8.
        encoded = text.encode(errors="surrogateescape")[:_MOST_TEXT]
        request = _REQUEST.pack(kind, number, *more, *(0,) * (2 - len(more))) + encoded
        with self._lock:
            if fds:
                _send(self._socket, request, fds)
            else:
                os.write(self.fd, request)
            answer = os.read(self.fd, 64)
        if len(answer) < 4:
            raise BrokenPipeError(errno.EPIPE, "the broker has ended")
        return int.from_bytes(answer[:4], "little")

    def _ask_for_fds(self, kind: int, number: int, more: int) -> tuple[int, list[int]]:
        os.write(self.fd, _REQUEST.pack(kind, number, more, 0))
        answer, fds = _receive(self._socket, 64, 1)
        return int.from_bytes(answer[:4], "little"), fds

    def close(self) -> None:
        """Let it end, and wait until it has; if it holds memory, it ends after this process."""
        if self.fd < 0:
            return
        self._socket.close()
        self.fd = -1
        if self._outlives:
            return
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


class _Range(NamedTuple):
    fd: int
    start: int
    size: int


class _Folder(NamedTuple):
    fd: int
    name: str
    device: int
    inode: int


class _Broker:
    """The other end: one request after another, until the VMM has ended."""

    def __init__(self, connection: _socket.socket, vmm: int, services: Services, terminal: Terminal | None) -> None:
        self._vmm = vmm
        self._terminal = terminal
        self._services = services
        self._ranges: list[_Range] = []
        self._folders: list[_Folder] = []
        self._children: list[int] = []
        self._sealed = self._zeroed = False
        self._audits_left = 1
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTTOU):
            signal.signal(number, signal.SIG_IGN)  # it ends with the VMM
        self._socket = connection
        kept = connection.fileno()
        null = os.open(os.devnull, os.O_RDWR)
        if self._terminal is None:
            os.dup2(null, 0)
        os.dup2(null, 1)  # whoever reads the guest's console must see its end
        os.closerange(3, kept)
        os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
        self._vmm_ends = -1
        with contextlib.suppress(ProcessLookupError):  # it has ended already: there is nothing to keep
            self._vmm_ends = os.pidfd_open(vmm)

    def serve(self) -> int:
        try:
            while True:
                most_fds = 0 if self._sealed else 1
                try:
                    request, fds = _receive(self._socket, _REQUEST.size + _MOST_TEXT, most_fds)
                except ConnectionError:
                    request, fds = b"", []
                if not request:
                    return 0
                self._answer(request, fds)
        finally:
            self._restore_terminal()
            if self._ranges:
                _end(self._vmm_ends, _GRACE)  # and with it its mappings
            for child in self._children:
                _end(child, _CHILD_GRACE)
            self._give_back()
            self._services.verdict(False)

    def _restore_terminal(self) -> None:
        """The VMM makes it raw, and may not come to undo that."""
        if self._terminal is not None:
            self._terminal.restore()

    def _answer(self, request: bytes, fds: list[int]) -> None:
        status, answer_fds = 0, list[int]()
        try:
            if len(request) == SIGINFO_SIZE and int.from_bytes(request[:4], "little") == _SIGSYS:
                number = int.from_bytes(request[SIGINFO_SYSCALL_AT : SIGINFO_SYSCALL_AT + 4], "little")
                what = f"the VMM made a system call that its sandbox does not allow: {name_of(number)}"
                self._restore_terminal()
                _say(ERROR, "offmap.cli.run", f"{what}; its guest is ended")
            elif len(request) >= _REQUEST.size:
                status, answer_fds = self._obey(_REQUEST.unpack_from(request), request[_REQUEST.size :], fds)
        except OSError as error:
            status = error.errno or errno.EIO
        answer = status.to_bytes(4, "little")
        with contextlib.suppress(OSError):
            _send(self._socket, answer, answer_fds)
        for fd in answer_fds:
            os.close(fd)

    def _obey(self, request: tuple[int, ...], text: bytes, fds: list[int]) -> tuple[int, list[int]]:
        """Do what was asked for. Return the answer's number, and descriptors."""
        kind, number, first, second = request
        match kind:
            case _ if kind == _LOG:
                name, _, message = text.decode(errors="replace").partition("\0")
                _say(number, name, message)
            case _ if kind == _CONNECT and number < len(self._folders):
                folder = self._folders[number]
                with self._services.connect(folder.fd, f"{folder.name}_{first & 0xFFFFFFFF}") as client:
                    return 0, [os.dup(client.fileno())]
            case _ if kind == _AUDIT and self._audits_left:
                self._audits_left -= 1
                self._services.audit(self._vmm)
            case _ if kind == _VERDICT:
                status = self._services.verdict(bool(number))
                return (_NO_STATUS if status is None else status), []
            case _ if kind == _ZEROED:
                self._zeroed = True
            case _ if kind == _SEAL:
                self._sealed = True
            case _ if kind == _KEEP_RANGE and fds and not self._sealed:
                self._ranges.append(_Range(fds[0], first, second))
            case _ if kind == _KEEP_CHILD and fds and not self._sealed:
                self._children.append(fds[0])
            case _ if kind == _KEEP_FOLDER and fds and not self._sealed:
                name = os.fsdecode(text)
                found = os.stat(name, dir_fd=fds[0], follow_symlinks=False)
                self._folders.append(_Folder(fds[0], name, found.st_dev, found.st_ino))
            case _:
                return errno.EINVAL, []
        return 0, []

    def _give_back(self) -> None:
        """Let the next VMM have the memory; what was in it is not for that one."""
        for kept in self._ranges:
            if not self._zeroed:
                with contextlib.suppress(OSError), mmap.mmap(kept.fd, kept.size, offset=kept.start) as memory:
                    for at in range(0, kept.size, 1 << 20):
                        memory[at : at + (1 << 20)] = bytes(min(1 << 20, kept.size - at))
            os.close(kept.fd)
        for folder in self._folders:
            with contextlib.suppress(OSError):
                found = os.stat(folder.name, dir_fd=folder.fd, follow_symlinks=False)
                if (found.st_dev, found.st_ino) == (folder.device, folder.inode):
                    os.unlink(folder.name, dir_fd=folder.fd)
            os.close(folder.fd)


def _end(pidfd: int, grace: int) -> None:
    """Wait until a process has ended. One that does not within so many milliseconds is killed."""
    ended = select.poll()
    ended.register(pidfd, select.POLLIN)
    if not ended.poll(grace):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        ended.poll()


def _say(level: int, name: str, message: str) -> None:
    name = name if name.startswith("offmap") and printable(name) == name else "offmap"
    Logger(name).log(min(max(level, 10), 50), "%s", "\n".join(map(printable, message.splitlines())))
    sys.stderr.flush()


def _send(connection: _socket.socket, data: bytes, fds: Sequence[int]) -> None:
    rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
    connection.sendmsg([data], rights)


def _receive(connection: _socket.socket, size: int, most_fds: int) -> tuple[bytes, list[int]]:
    """One record, and the descriptors that came with it; those that are too many the kernel closes."""
    room = _socket.CMSG_SPACE(4 * most_fds) if most_fds else 0
    data, ancillary, _, _ = connection.recvmsg(size, room, _socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, rights in ancillary:
        if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS):
            fds += struct.unpack(f"{len(rights) // 4}i", rights[: len(rights) // 4 * 4])
    return data, fds
