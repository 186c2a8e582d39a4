"""Frames between the lab's two ends, over one byte stream (a virtio-serial port).

A frame is ``struct { u8 kind; u8 pad[3]; u32 channel; u32 length; }``, little-endian, and ``length`` bytes of payload.
The channel is the number of a command, given by the outer end. Every data stream has a window: its sender may have at
most `WINDOW` bytes unacknowledged, so a command that does not read its input, or a reader that does not take its
output, never holds up the others.

Plain integers in place of enums: importing ``enum`` costs 40 ms inside an emulated host.
"""

import struct

# From the inner end.
HELLO = 1  # once, when commands may come: "release=… kvm=… token=…" as text
STDOUT = 2
STDERR = 3
EXIT = 4  # i32: exit status, or minus the signal's number
FAILED = 5  # i32 errno, i32 whether its folder could be entered: the command could not be started
WAITING = 6  # once, before HELLO: the host is up and needs GO to go on
# From the outer end.
START = 16  # see encode_start
STDIN = 17
STDIN_EOF = 18
SIGNAL = 19  # i32, to the command's process group
RESIZE = 20  # two i32: rows, columns of its terminal
GO = 21  # once: NUL-terminated NAME=VALUE strings (root.Settings)
NUDGE = 22  # of no command: that it comes is an interrupt, and all there is to it
# Both ways: u8 kind of the data, u32 bytes taken.
ACK = 32

WINDOW = 256 * 1024
MAX_PAYLOAD = 32 * 1024  # what one write to a virtio port takes (port_fops_write in drivers/char/virtio_console.c)

_HEADER = struct.Struct("<B3xII")
_I32 = struct.Struct("<i")


def frame(kind: int, channel: int, payload: bytes = b"") -> bytes:
    """Encode one frame."""
    return _HEADER.pack(kind, channel, len(payload)) + payload


def i32(*values: int) -> bytes:
    """Encode integers as little-endian i32."""
    return b"".join(_I32.pack(value) for value in values)


def to_i32(payload: bytes) -> list[int]:
    """Decode a payload of little-endian i32."""
    return [value for (value,) in _I32.iter_unpack(payload)]


class Decoder:
    """Cuts a byte stream into frames, whatever the pieces it arrives in."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[int, int, bytes]]:
        """Take ``data``; return the frames now complete, as (kind, channel, payload)."""
        buffer = self._buffer
        buffer += data
        frames = []
        start = 0
        while len(buffer) - start >= _HEADER.size:
            kind, channel, length = _HEADER.unpack_from(buffer, start)
            end = start + _HEADER.size + length
            if len(buffer) < end:
                break
            frames.append((kind, channel, bytes(buffer[start + _HEADER.size : end])))
            start = end
        del buffer[:start]
        return frames


class Start:
    """A command to start: what, where, with what environment, and its terminal's (rows, columns) if it gets one."""

    def __init__(
        self, argv: list[bytes], env: list[bytes], cwd: bytes, terminal: tuple[int, int] | None = None
    ) -> None:
        self.argv = argv
        self.env = env
        self.cwd = cwd
        self.terminal = terminal


def encode_start(start: Start) -> bytes:
    """Encode a START payload: i32 rows, columns, argc; then NUL-terminated cwd, arguments and NAME=VALUE strings.

    Raises:
        ValueError: a string holds a NUL byte.
    """
    strings = [start.cwd, *start.argv, *start.env]
    if any(b"\0" in string for string in strings):
        raise ValueError("embedded null byte")
    rows, columns = start.terminal or (0, 0)
    return i32(rows, columns, len(start.argv)) + b"".join(string + b"\0" for string in strings)


def decode_start(payload: bytes) -> Start:
    """Decode a START payload."""
    rows, columns, argc = to_i32(payload[:12])
    strings = payload[12:].split(b"\0")[:-1]
    return Start(strings[1 : 1 + argc], strings[1 + argc :], strings[0], (rows, columns) if rows else None)
