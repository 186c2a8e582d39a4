"""The outer end of the agent's port: a socket whose waiting ends each second, to see what the host is doing."""

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress

from offmap.lab.guest.frames import MAX_PAYLOAD, NUDGE, frame
from offmap.patience import Watch

_SECOND = struct.pack("@ll", 1, 0)  # struct timeval


class AgentPort:
    """Sends to the agent and receives from it; one thread receives, any may send.

    Args:
        end: the connected socket.
        watch: returns a new watch of the host.

    Attributes:
        nudges: whether a host that is silent is interrupted.
    """

    def __init__(self, end: socket.socket, watch: Callable[[], Watch]) -> None:
        for limit in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            end.setsockopt(socket.SOL_SOCKET, limit, _SECOND)
        self._socket = end
        self._watch = watch
        self._lock = threading.Lock()  # held by who sends
        self.nudges = False

    def send(self, data: bytes) -> str:
        """Send it; return in which way the host is stuck if it does not take it. One that is gone takes anything."""
        watch: Watch | None = None
        view = memoryview(data)
        with self._lock:
            while view:
                try:
                    view = view[self._socket.send(view) :]
                    watch = None
                except BlockingIOError:  # SO_SNDTIMEO
                    watch = watch or self._watch()
                    if why := watch.stuck():
                        return why
                except OSError:
                    break
        return ""

    def receive(self) -> bytes:
        """Wait for what comes; nothing once the host is gone."""
        while True:
            try:
                return self._socket.recv(2 * MAX_PAYLOAD)
            except BlockingIOError:  # SO_RCVTIMEO
                self._nudge()
            except OSError:
                return b""

    def _nudge(self) -> None:
        """Interrupt a host that has been silent for a second.

        QEMU 7.2 can lose the interrupt of a host's timer: at an exit of a nested guest it clears a bit in the word of
        pending interrupts, without the lock under which others are set (target/i386/tcg/sysemu/svm_helper.c). If all
        in the host waits for the timer, it stands still until another interrupt comes, which brings the lost one too.
        """
        if self.nudges and self._lock.acquire(blocking=False):  # else something is on its way to it anyway
            try:
                with suppress(OSError):
                    self._socket.send(frame(NUDGE, 0), socket.MSG_DONTWAIT)
            finally:
                self._lock.release()
