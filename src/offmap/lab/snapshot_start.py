"""A host from a snapshot: the first host of a kind is saved where it waits for its GO, and the next ones go on there.

QEMU's migration stream holds only the devices' state. The RAM is a file, mapped shared while the snapshot is made and
privately afterwards; the capability x-ignore-shared leaves it out of the stream.
"""

import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from offmap.lab.console import Console
from offmap.lab.errors import LabEnded, LabError
from offmap.lab.initramfs import Initramfs
from offmap.lab.kernel import HostKernel
from offmap.lab.qemu import HostOptions, Ram
from offmap.lab.qmp import Qmp, QmpError
from offmap.lab.snapshot import Kind, Snapshots, SnapshotUnusable, kind_of
from offmap.log import Logger
from offmap.patience import Deadline

_log = Logger("offmap.lab")
_STATE = "state"  # what the descriptor is called on QEMU's side
_ENDS = frozenset({"completed", "failed"})


class Host(Protocol):
    """What a host must be able to do; `LabHost` is one."""

    @property
    def killed(self) -> bool:
        """Whether somebody ended it on purpose."""

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
    """Start a host from the snapshot of its kind, which is made now unless there is one.

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
        raise SnapshotUnusable(f"no snapshots with {options.accel}")
    snapshots = Snapshots()
    kind = kind_of(kernel, options, archive)
    try:
        host, said = _restored(snapshots, kind, new, ends)
        console.feed(said)
        return host
    except SnapshotUnusable as why:
        _log.debug("%s: making snapshot %s", why.what, kind.name)
    console.clear()
    try:
        _make(snapshots, kind, options, archive, console, new, ends)
        return _restored(snapshots, kind, new, ends)[0]
    except SnapshotUnusable:
        console.clear()
        raise


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
        except (QmpError, LabEnded) as error:  # a disk that fills up ends QEMU with SIGBUS, for one
            if host.killed:
                raise
            raise SnapshotUnusable(f"no snapshot can be made: {error.what}") from error
        finally:
            host.close()
        draft.finish(console.text.encode())
        _log.debug("snapshot %s made in %.1f s", kind.name, time.monotonic() - began)


def _restored(snapshots: Snapshots, kind: Kind, new: Callable[[Ram], H], ends: Deadline | None) -> tuple[H, bytes]:
    """Return a host that goes on from the snapshot, and what its kernel said while it booted."""
    with snapshots.open(kind) as snapshot:
        host = new(snapshot.ram)
        try:
            host.restore(snapshot.state)
            host.go(ends)
        except BaseException as error:
            wanted = not host.killed and (ends is None or ends.left > 0)
            host.close()
            if not wanted or not isinstance(error, LabError):
                raise
            snapshots.drop(kind.name)
            raise SnapshotUnusable(f"the snapshot does not go on and was dropped: {error.what}") from error
        _log.debug("from snapshot %s", kind.name)
        return host, snapshot.console


def save(qmp: Qmp, state: int) -> None:
    """Stop QEMU's guest and write its devices' state to ``state``. Raises QmpError: QEMU cannot."""
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
