"""The broker, as a VMM that a guest has taken over asks it."""

import os
import socket
import struct

from offmap.sandbox import broker as module
from offmap.sandbox.broker import Services, _Broker, _Folder

from .choices import Choices
from .target import Target

_REQUEST = struct.Struct("<IIQQ")
_KINDS = (*range(100, 109), 0, 99, 109, 0xFFFFFFFF)
_NUMBERS = (0, 1, 2, 7, 40, 0xFFFFFFFF)


class BrokerTarget(Target):
    """One request after another, none with a descriptor: it takes none once it is sealed."""

    sources = ("sandbox/broker.py",)

    def __init__(self) -> None:
        self._asked: list[str] = []
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._theirs = theirs
        broker = _Broker.__new__(_Broker)  # its constructor is for a process of its own
        broker._vmm, broker._ranges, broker._sealed, broker._zeroed = os.getpid(), [], True, False
        broker._audits_left, broker._terminal = 1, None
        broker._socket = theirs
        broker._services = Services(self._connect, lambda _pid: None, lambda wait: 3 if wait else None)
        self._folder = os.open("/", os.O_PATH | os.O_DIRECTORY)
        broker._folders = [_Folder(self._folder, "fuzzed", 0, 0)]
        self._broker = broker
        self._say = module._say
        vars(module)["_say"] = self._said

    def _connect(self, folder: int, name: str) -> socket.socket:
        prefix, _, port = name.rpartition("_")
        assert (folder, prefix) == (self._folder, "fuzzed")
        assert port == str(int(port)) and int(port) < 1 << 32, "a name that leads elsewhere"
        if int(port) & 1:
            raise ConnectionRefusedError(111, "nobody listens")
        return socket.socket(socket.AF_UNIX)

    @staticmethod
    def _said(level: int, name: str, message: str) -> None:
        """Instead of the log: what it would be given must be texts."""
        assert isinstance(level, int) and isinstance(name, str) and isinstance(message, str)

    def case(self, choices: Choices) -> bool:
        c = choices
        answered = False
        for _ in range(8):
            if not c.left:
                break
            request = _REQUEST.pack(c.of(_KINDS), c.of(_NUMBERS) if c.byte() < 200 else c.word(4), c.word(8), c.word(8))
            what = c.byte()
            if what < 100:
                request += c.bytes(c.byte())
            elif what > 240:
                request = c.bytes(c.byte())
            elif what > 230:
                request = (31).to_bytes(4, "little") + c.bytes(124)  # a siginfo of a violation
            before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
            self._broker._answer(request, [])
            assert len(os.listdir("/proc/self/fd")) <= before + 1, "a descriptor is left open"  # noqa: PTH208
            data, ancillary, _, _ = self._ours.recvmsg(64, socket.CMSG_SPACE(4))
            for _, _, rights in ancillary:
                os.close(struct.unpack("i", rights)[0])
            assert len(data) == 4
            answered = True
        return answered

    def close(self) -> None:
        vars(module)["_say"] = self._say
        os.close(self._folder)
        self._ours.close()
        self._theirs.close()
