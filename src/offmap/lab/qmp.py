"""QEMU's control protocol (QMP), as much of it as snapshots need. Calls block; the socket's timeout is their limit."""

import json
import os
import socket
from typing import Self

from offmap.lab.errors import LabError
from offmap.owned import Owned


class QmpError(LabError):
    """QEMU refused a command, or is gone."""


class Qmp(Owned):
    """The outer end of a QMP connection.

    Args:
        connection: a connected socket, which is closed with this object.
        seconds: how long a command may take.
    """

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._socket = connection
        self._socket.settimeout(seconds)
        self._lines = connection.makefile("rb")

    def negotiate(self) -> Self:
        """Take the greeting and enter command mode."""
        self._message()
        self.execute("qmp_capabilities")
        return self

    def execute(self, command: str, arguments: dict[str, object] | None = None, fd: int | None = None) -> object:
        """Run a command; return what it returns.

        Args:
            command: its name.
            arguments: its arguments.
            fd: a descriptor to send along.

        Raises:
            QmpError: QEMU refused, did not answer in time, or is gone.
        """
        message = json.dumps({"execute": command, "arguments": arguments or {}}).encode() + b"\n"
        try:
            if fd is None:
                self._socket.sendall(message)
            else:
                socket.send_fds(self._socket, [message], [fd])
        except OSError as error:
            raise QmpError(f"QEMU does not take the command {command}: {os.strerror(error.errno or 0)}") from error
        while True:
            answer = self._message()
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                error_text = answer["error"]
                what = error_text.get("desc") if isinstance(error_text, dict) else error_text
                raise QmpError(f"QEMU refuses {command}: {what}")
            # Anything else is an event.

    def await_event(self, name: str, key: str, values: frozenset[str]) -> str:
        """Wait for the event ``name`` whose datum ``key`` is one of ``values``; return that."""
        while True:
            message = self._message()
            data = message.get("data")
            if message.get("event") == name and isinstance(data, dict) and data.get(key) in values:
                return str(data[key])

    def _message(self) -> dict[str, object]:
        try:
            line = self._lines.readline()
        except OSError as error:
            raise QmpError("QEMU does not answer") from error
        if not line.endswith(b"\n"):  # it may have ended in the middle of one
            raise QmpError("QEMU is gone")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise QmpError(f"QEMU says what is no QMP: {line[:80]!r}")
        return message

    def close(self) -> None:
        """Close the connection."""
        self._lines.close()
        self._socket.close()
