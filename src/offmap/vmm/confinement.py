"""A guest's process confined: the steps in their order, and the broker beside it.

Before the machine is built: the broker. When all is open and loaded, and no thread runs: this process hands its broker
what it must not keep, and gives up its rights. Then its threads start, each puts on the filter of its kind, this thread
too, and none goes on before all have. Only then may the guest run.
"""

import contextlib
import ctypes
import fcntl
import os
import stat
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module

from offmap import log
from offmap.errors import OffmapError
from offmap.files import read_text
from offmap.owned import Owned
from offmap.sandbox import policy, seccomp
from offmap.sandbox.broker import Broker, Services
from offmap.sandbox.confine import Confined, Limits, confine
from offmap.typed import TYPE_CHECKING
from offmap.uapi.devices import DEV_KVM, PHYSICAL_MEMORY
from offmap.uapi.page import PAGE_SIZE
from offmap.vmm.outcome import Outcome

if TYPE_CHECKING:
    import socket

    from offmap.devices.virtio.device import VirtioDevice
    from offmap.sandbox.rules import Rule
    from offmap.vmm.machine import Machine

_MOST_FDS = 1024
_IN_MEMORY = ("/memfd:", "anon_inode:")
_M_ARENA_MAX = -8  # malloc.h
# What an end may need, and would open a file for.
_NEEDED = ("select", "signal", "errno", "contextlib")
_NEEDED_TO_COUNT = ("offmap.kvm.stats",)


class Confinement(Owned):
    """Of this process, whose one guest it is for.

    Args:
        audit, verdict: see `Services`.
        before: called when all is built, before the process gives up its rights: opens what is written in the end.

    Attributes:
        broker: the process beside this one.
        confined: what is in force, once it was entered.
    """

    def __init__(
        self,
        audit: Callable[[int], None],
        verdict: Callable[[bool], int | None],
        before: Callable[[], None] = lambda: None,
    ) -> None:
        if not seccomp.supported():
            raise OffmapError(
                "this kernel has no seccomp filters, which the sandbox of the VMM is made of",
                "use one with CONFIG_SECCOMP_FILTER, or --no-sandbox",
            )
        self._inherited = [fd for fd in _open_fds() if fd > 2 and os.get_inheritable(fd)]
        self._before = before
        self.confined: Confined | None = None
        self.broker = Broker(Services(_connect, audit, verdict))
        self._page: object = None

    @contextmanager
    def entered(self, machine: "Machine") -> Iterator["Gate"]:
        """Confine this thread, and those that are started meanwhile; at the end all of them are.

        Raises:
            OffmapError: the least is not to be had.
        """
        for name in (*_NEEDED, *(_NEEDED_TO_COUNT if machine.config.count_exits else ())):
            import_module(name)
        self._before()
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)  # with more, the C library counts processors, by a file
        self._hand_over(machine)
        _close_what_reaches_further(self._inherited)
        threads = len(machine.devices) + machine.config.vcpus
        mapped = int(read_text("/proc/self/statm").split()[0]) * PAGE_SIZE
        limits = Limits(_MOST_FDS, _longest_file(machine), mapped, threads)
        self.broker.seal()
        self._page = seccomp.report_violations_to(self.broker.fd)
        self.confined = confine(limits)
        log.forward_to(self.broker.log)
        sys.excepthook = _tell
        threading.excepthook = lambda thrown: _tell(thrown.exc_type, thrown.exc_value, thrown.exc_traceback)
        gate = Gate(threads)
        try:
            yield gate
            gate.wait_for_all()
            kinds = [kind for device in machine.devices for kind in device.kinds]
            seccomp.install(seccomp.compiled(policy.rules_of_main(kinds)))
        except BaseException as error:
            # Before any of them goes on: one may have no filter.
            why = error if isinstance(error, OffmapError) else OffmapError("the VMM could not be confined")
            machine.stop(Outcome.FAILED, why)
            raise
        finally:
            gate.open()

    def _hand_over(self, machine: "Machine") -> None:
        """Let the broker have the folders of vsocks, and devices' processes."""
        number = 0
        for device in machine.devices:
            if device.child is not None:
                child = device.child.hand_over()
                self.broker.keep_child(child)
                os.close(child)
            if "vsock" in device.kinds:
                from offmap.devices.virtio.vsock import Vsock

                if isinstance(device, Vsock):
                    self.broker.keep_folder(device.listener.folder.fd, device.listener.name)
                    device.listener.hand_over(partial(self.broker.connect, number))
                    number += 1

    def to_json(self) -> dict[str, object]:
        """What is in force, for reports."""
        if self.confined is None:
            return {"sandbox": None}
        return {
            "sandbox": {
                "uid": self.confined.uid,
                "capabilities": 0,
                "no_new_privs": True,
                "seccomp": "a filter for each kind of thread",
                "namespaces": list(self.confined.namespaces),
                "root": self.confined.root,
                "landlock": self.confined.landlock,
                "missing": list(self.confined.missing),
            }
        }

    def __str__(self) -> str:
        if self.confined is None:
            return "no sandbox"
        held = self.confined
        landlock = f", Landlock {held.landlock}" if held.landlock else ""
        missing = f"; this host does not allow: {', '.join(held.missing)}" if held.missing else ""
        namespaces = " ".join(held.namespaces) or "none"
        user = f"uid {held.uid}, no capabilities, no_new_privs, seccomp"
        return f"{user}, namespaces {namespaces}, root {held.root}{landlock}{missing}"

    def close(self) -> None:
        """Let the broker end, and wait for it."""
        self.broker.close()


class Gate:
    """Where threads put on their filters, and wait for each other.

    Args:
        count: threads that are to come.
    """

    def __init__(self, count: int) -> None:
        self._left = count
        self._changed = threading.Condition()
        self._open = False
        self._error: OffmapError | None = None

    def device(self, device: "VirtioDevice") -> None:
        """Pass, on the thread of a device."""
        self._pass(policy.rules_of_device(device.kinds))

    def vcpu(self) -> None:
        """Pass, on the thread of a vCPU."""
        self._pass(policy.rules_of_vcpu())

    def _pass(self, rules: "list[Rule]") -> None:
        error: OffmapError | None = None
        try:
            seccomp.install(seccomp.compiled(rules))
        except OffmapError as failed:
            error = failed
        with self._changed:
            self._left -= 1
            self._error = self._error or error
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._open)

    def wait_for_all(self) -> None:
        """Wait until each thread has its filter. Raises OffmapError: one could not."""
        with self._changed:
            self._changed.wait_for(lambda: self._left <= 0)
            if self._error is not None:
                raise self._error

    def open(self) -> None:
        """Let them go on."""
        with self._changed:
            self._open = True
            self._changed.notify_all()


def _open_fds() -> Iterator[int]:
    """This process's descriptors. One is that of the list, which is closed by now."""
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        with contextlib.suppress(OSError):
            os.fstat(int(name))
            yield int(name)


def _close_what_reaches_further(inherited: Collection[int]) -> None:
    """Close descriptors of directories, physical memory and /dev/kvm, and what whoever started us has left open.

    Args:
        inherited: a part of this guest has made those its own that are not inheritable any more.
    """
    for fd in _open_fds():
        opened = os.fstat(fd)
        device = opened.st_rdev if stat.S_ISCHR(opened.st_mode) else None
        left = fd in inherited and os.get_inheritable(fd)
        if left or stat.S_ISDIR(opened.st_mode) or device == DEV_KVM or device in PHYSICAL_MEMORY:
            os.close(fd)


def _longest_file(machine: "Machine") -> int | None:
    """Bytes of the longest file that it writes to and that keeps its size, a drive or one in memory.

    None: it has another one open for writing, which may become as long as it will (its output, a report).
    """
    longest, drives = 0, {fd for device in machine.devices for fd in device.files}
    for fd in _open_fds():
        opened = os.fstat(fd)
        if stat.S_ISREG(opened.st_mode) and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
            if fd not in drives and not os.readlink(f"/proc/self/fd/{fd}").startswith(_IN_MEMORY):  # noqa: PTH115
                return None
            longest = max(longest, opened.st_size)
    return longest


def _connect(folder: int, name: str) -> "socket.socket":
    from offmap.devices.virtio.vsock_host import connect_in

    return connect_in(folder, name)


def _tell(_type: object, error: BaseException | None, _traceback: object) -> None:
    """Tell of a bug without Python's own traceback, which opens source files."""
    log.Logger("offmap.vmm").log(log.ERROR, "this is a bug in offmap", error=error)
