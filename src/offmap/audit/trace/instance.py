"""An instance of tracefs with our own kprobes: made, read and removed."""

import contextlib
import errno
import os
import re
import select
import threading
from collections.abc import Collection
from pathlib import Path

from offmap.audit.trace.probes import NEEDED, PROBES, Probe
from offmap.errors import KernelError, Undetermined
from offmap.files import text_of
from offmap.owned import Owned

_ROOTS = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))
_PREFIX = "offmap_"
_BUFFER_KIB = 2048  # for each processor; an event with its stack takes some hundred bytes, one of vmap 2.5 KiB
_MOST_BYTES = 64 << 20  # that wait here to be looked at
_PIECE = 1 << 16
_PERIOD_MS = 200


class Instance(Owned):
    """Probes that fire into a ring buffer of their own; a thread empties it all the time.

    Attributes:
        not_traced: mechanisms that this kernel gives no way to probe, with the reason.
        lost_here: whether text was dropped as nobody took it in time.

    Raises:
        Undetermined: this kernel has no kprobes or no tracefs, or a function that is needed cannot be probed.
    """

    def __init__(self, root: Path | None = None) -> None:
        self._root = root or _tracefs()
        if not (self._root / "kprobe_events").exists():
            raise Undetermined(
                "what is mapped between two walks cannot be traced: this kernel has no kprobes in tracefs",
                "use a kernel with CONFIG_KPROBE_EVENTS, or --watch without --trace",
            )
        _remove_stale(self._root)
        self._group = f"{_PREFIX}{os.getpid()}"
        self._folder = self._root / "instances" / self._group
        self._text: list[bytes] = []
        self._waiting = 0
        self.lost_here = False
        self._lock = threading.Lock()
        self._pipe = -1
        self._stop, self._stopping = os.pipe()
        self._thread: threading.Thread | None = None
        self.not_traced: dict[str, str] = {}
        self._events: set[str] = set()
        try:
            self._set_up()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End it, and take all of it out of the kernel. A second call does nothing."""
        if self._stopping < 0:
            return
        os.write(self._stopping, b"x")
        if self._thread is not None:
            self._thread.join()
        for fd in (self._stop, self._stopping, self._pipe):
            if fd >= 0:
                os.close(fd)
        self._stop = self._stopping = -1
        _remove(self._root, self._group)

    def take(self) -> str:
        """The text of trace_pipe since it was asked for last: all that was recorded before this call."""
        with self._lock:
            self._pull()
            pieces, self._text, self._waiting = self._text, [], 0
        return b"".join(pieces).decode("utf-8", errors="replace")

    def missed(self) -> int | None:
        """Calls so far of which there is no event; None if the kernel does not say."""
        return missed_calls(self._folder, self._root, self._events)

    def _set_up(self) -> None:
        self._folder.mkdir()
        _write(self._folder / "trace_clock", "mono")
        for option in ("stacktrace", "record-tgid"):
            _write(self._folder / "options" / option, "1")
        _write(self._folder / "buffer_size_kb", str(_BUFFER_KIB))
        probed = {probe.mechanism for probe in PROBES if self._define(probe)}
        for probe in PROBES:
            if probe.mechanism in probed:
                self.not_traced.pop(probe.mechanism, None)
        if missing := [name for name in NEEDED if name not in probed]:
            why = "; ".join(f"{name}: {self.not_traced[name]}" for name in missing)
            raise Undetermined(f"what is mapped between two walks cannot be traced on this kernel: {why}")
        self._pipe = os.open(self._folder / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK)
        self._thread = threading.Thread(target=self._empty, daemon=True)
        self._thread.start()
        _write(self._folder / "events" / self._group / "enable", "1")

    def _define(self, probe: Probe) -> bool:
        """Define a probe; say whether this kernel has taken it."""
        try:
            _append(self._root / "kprobe_events", probe.definition(self._group))
        except OSError as error:
            # EINVAL: its arguments are numbered by BTF, which does not know it either.
            absent = error.errno in {errno.ENOENT, errno.EINVAL}
            reason = f"no function {probe.symbol} that can be probed" if absent else f"{probe.symbol}: {error.strerror}"
            self.not_traced.setdefault(probe.mechanism, reason)
            return False
        self._events.add(probe.event)
        return True

    def _empty(self) -> None:
        """Of the thread: move what the kernel has recorded to memory, where there is more of it.

        It looks by itself from time to time: a wake-up for each event would cost the host more than that.
        """
        stop = select.poll()
        stop.register(self._stop, select.POLLIN)
        while not stop.poll(_PERIOD_MS):
            with self._lock:
                self._pull()

    def _pull(self) -> None:
        """Read until there is no more. The lock is held."""
        while True:
            try:
                piece = os.read(self._pipe, _PIECE)
            except (BlockingIOError, InterruptedError):
                return
            if not piece:
                return
            if self._waiting + len(piece) > _MOST_BYTES:
                self.lost_here = True
                continue
            self._text.append(piece)
            self._waiting += len(piece)


def missed_calls(folder: Path, root: Path, events: Collection[str]) -> int | None:
    """Calls dropped by the buffers of the instance in `folder`, or by a probe of these events that was busy.

    Returns:
        None if not all of them can be read.
    """
    missed, seen = 0, set[str]()
    buffers = list((folder / "per_cpu").glob("cpu*/stats"))
    for stats in buffers:
        found = re.findall(r"^(?:overrun|commit overrun|dropped events): (\d+)$", text_of(stats), re.MULTILINE)
        if len(found) != 3:
            return None
        missed += sum(map(int, found))
    for line in text_of(root / "kprobe_profile").splitlines():
        words = line.split()
        if len(words) == 3 and words[0] in events and words[2].isdigit():
            seen.add(words[0])
            missed += int(words[2])
    return missed if buffers and seen == set(events) else None


def _tracefs() -> Path:
    for root in _ROOTS:
        if (root / "instances").is_dir():
            return root
    raise Undetermined(
        "what is mapped between two walks cannot be traced: tracefs is not mounted",
        "mount -t tracefs tracefs /sys/kernel/tracing",
    )


def _remove_stale(root: Path) -> None:
    """Remove what a watch left that was killed."""
    for folder in (root / "instances").glob(f"{_PREFIX}*"):
        pid = folder.name.removeprefix(_PREFIX)
        if pid.isdigit() and not Path("/proc", pid).exists():
            _remove(root, folder.name)


def _remove(root: Path, group: str) -> None:
    folder = root / "instances" / group
    with contextlib.suppress(OSError):
        (folder / "events" / group / "enable").write_text("0")
    with contextlib.suppress(OSError):
        folder.rmdir()
    for line in text_of(root / "kprobe_events").splitlines():
        name = line.split(" ", 1)[0].partition(":")[2]
        if name.startswith(f"{group}/"):
            with contextlib.suppress(OSError):
                _append(root / "kprobe_events", f"-:{name}")


def _append(path: Path, line: str) -> None:
    """Write one line. Not open("a"), which seeks to the end: that file has none."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(fd, line.encode() + b"\n")
    finally:
        os.close(fd)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise KernelError(
            f"writing {path}", error, "--trace needs root and a tracefs that is not locked down"
        ) from None
