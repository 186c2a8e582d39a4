"""A host from a snapshot: taken of the first of its kind where it waits for its GO, and gone on from by the next ones.

QEMU's migration stream holds the devices' state alone: the RAM is a file, which is mapped shared while it is made and
privately from then on (the capability x-ignore-shared leaves it out of the stream).
"""

import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from offmap.lab.console import Console
from offmap.lab.errors import LabEnded, LabTimeout
from offmap.lab.initramfs import Initramfs
from offmap.lab.kernel import HostKernel
from offmap.lab.patience import Deadline
from offmap.lab.qemu import HostOptions, Ram
from offmap.lab.qmp import Qmp, QmpError
from offmap.lab.snapshot import Kind, Snapshots, SnapshotUnusable, kind_of
from offmap.log import Logger

__all__ = ["Host", "from_snapshot", "restore", "save"]

_log = Logger("offmap.lab")
_STATE = "state"  # what the descriptor is called on QEMU's side
_ENDS = frozenset({"completed", "failed"})


class Host(Protocol):
    """What a host must be able to do; `LabHost` is one."""

    def boot(self, archive: bytes, ends: Deadline | None) -> None:
        """Boot to where it waits for its GO."""

    def save(self, state: int) -> None:
        """Write the devices' state, and end."""

    def restore(self, state: int) -> None:
        """Read the devices' state and go on."""

    def go(self, ends: Deadline | None) -> None:
        """Make it a host of its own that takes commands."""

    def close(self) -> None:
        """End it."""


H = TypeVar("H", bound=Host)


def from_snapshot(
    kernel: HostKernel,
    options: HostOptions,
    archive: Initramfs,
    console: Console,
    new: Callable[[Ram], H],
    ends: Deadline | None,
) -> H:
    """Start a host from the snapshot of its kind, which is taken now unless there is one.

    Args:
        kernel, options: what the host is.
        archive: its initramfs.
        console: gets what the host's kernel said while it booted, whenever that was.
        new: makes a host that is not started, with its RAM in these files.
        ends: when the start must be done.

    Raises:
        SnapshotUnusable: the host must boot in full.
        LabError: the host does not boot.
    """
    if options.accel != "tcg":
        raise SnapshotUnusable("snapshots are for emulated processors; under KVM a host boots in two seconds")
    snapshots = Snapshots()
    kind = kind_of(kernel, options, archive)
    try:
        return _restored(snapshots, kind, console, new, ends)
    except SnapshotUnusable as why:
        _log.debug("%s: making snapshot %s", why.what, kind.name)
    _make(snapshots, kind, options, archive, console, new, ends)
    return _restored(snapshots, kind, None, new, ends)


def _make(
    snapshots: Snapshots,
    kind: Kind,
    options: HostOptions,
    archive: Initramfs,
    console: Console,
    new: Callable[[Ram], H],
    ends: Deadline | None,
) -> None:
    with snapshots.making(kind, options) as draft:
        host = new(draft.ram)
        try:
            host.boot(archive.archive(), ends)
            began = time.monotonic()
            host.save(draft.state)
        except QmpError as error:
            raise SnapshotUnusable(f"no snapshot can be made: {error.what}") from error
        finally:
            host.close()
        draft.finish(console.text.encode())
        _log.debug("snapshot %s made in %.1f s", kind.name, time.monotonic() - began)


def _restored(
    snapshots: Snapshots, kind: Kind, console: Console | None, new: Callable[[Ram], H], ends: Deadline | None
) -> H:
    with snapshots.open(kind) as snapshot:
        host = new(snapshot.ram)
        try:
            host.restore(snapshot.state)
            host.go(ends)
        except (QmpError, LabEnded, LabTimeout) as error:
            host.close()
            if ends is not None and not ends.left:
                raise
            snapshots.drop(kind.name)
            raise SnapshotUnusable(f"the snapshot does not go on and was dropped: {error.what}") from error
        except BaseException:
            host.close()
            raise
        if console is not None:
            console.feed(snapshot.console)
        _log.debug("from snapshot %s", kind.name)
        return host


def save(qmp: Qmp, state: int) -> None:
    """Stop QEMU's guest and write its devices' state to ``state``.

    Raises:
        QmpError: QEMU cannot.
    """
    _prepare(qmp)
    qmp.execute("stop")
    qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 40})
    qmp.execute("getfd", {"fdname": _STATE}, fd=state)
    qmp.execute("migrate", {"uri": f"fd:{_STATE}"})
    if qmp.await_event("MIGRATION", "status", _ENDS) != "completed":
        raise QmpError("QEMU could not save the devices' state")


def restore(qmp: Qmp, state: int) -> None:
    """Read the devices' state from ``state`` into a QEMU that waits for it; its guest then runs.

    Raises:
        QmpError: QEMU does not take it.
    """
    _prepare(qmp)
    qmp.execute("getfd", {"fdname": _STATE}, fd=state)
    qmp.execute("migrate-incoming", {"uri": f"fd:{_STATE}"})
    if qmp.await_event("MIGRATION", "status", _ENDS) != "completed":
        raise QmpError("QEMU does not take the devices' state")
    qmp.execute("cont")  # it was stopped when it was saved


def _prepare(qmp: Qmp) -> None:
    qmp.negotiate()
    wanted = ("x-ignore-shared", "events")
    capabilities = [{"capability": name, "state": True} for name in wanted]
    qmp.execute("migrate-set-capabilities", {"capabilities": capabilities})
