"""A VMM's audits of itself: ``offmap audit`` as a process of its own, so that what is looked at is not what looks."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from offmap.errors import BackendRefused, ExitStatus
from offmap.memory.backend import Backend
from offmap.memory.iomem import PhysicalRange
from offmap.uapi.page import PAGE_SIZE

if TYPE_CHECKING:
    import subprocess  # imported where it is used: not every guest's start has to wait for it

__all__ = ["SelfAudit", "keep_from_guest"]


_GRACE = 2.0  # seconds


def _command(*options: str) -> list[str]:
    return [sys.executable, "-m", "offmap", "audit", "--no-progress", str(os.getpid()), *options]


def keep_from_guest(backend: Backend, say: Callable[[str], None]) -> Sequence[PhysicalRange]:
    """Audit this process's guest RAM, which must be hidden and hold nothing yet.

    Returns:
        The guest-physical pages that the host kernel maps all the same (aliases), which the guest must not get.

    Raises:
        BackendRefused: the memory is in the direct map, or it has struct pages, which may be aliased, and cannot be
            audited here.
    """
    import subprocess

    done = subprocess.run(
        _command("--json"), stdin=subprocess.DEVNULL, capture_output=True, check=False, text=True, errors="replace"
    )
    if done.returncode not in {ExitStatus.DONE, ExitStatus.EXPOSED} or not done.stdout:
        lines = done.stderr.strip().splitlines() or [f"the audit ended with status {done.returncode}"]
        reason = lines[-1].removeprefix("offmap audit: ")
        if backend.may_be_aliased:
            raise BackendRefused(
                f"the aliases of {backend.name} memory cannot be found and kept from the guest: {reason}"
            )
        say(f"the guest's RAM is not verified: {reason}")
        return ()
    result = json.loads(done.stdout)
    if in_direct_map := result["pages"]["direct_map_pages"]:
        raise BackendRefused(
            f"{in_direct_map} of {result['pages']['ram_pages']} pages of the {backend.name} memory that this host gave "
            "are in its direct map",
            "use another backend",
        )
    pages = result["pages"]
    # One mapped page makes the verdict "exposed", whatever could not be seen of the others.
    if unseen := pages["unknown_pages"] + pages["not_populated_pages"]:
        reason = next(iter(pages["unknown_reasons"]), "they are not populated")
        raise BackendRefused(
            f"{unseen} of {pages['ram_pages']} pages of the {backend.name} memory that this host gave could not be "
            f"audited: {reason}",
            "try again, or use another backend",
        )
    excluded = [PhysicalRange(start, start + size) for start, size in result["mapped_guest_ranges"]]
    if excluded:
        count = sum(r.size for r in excluded) // PAGE_SIZE
        say(f"{count} pages of the guest's RAM are aliased in the host kernel and kept from the guest")
    return excluded


class SelfAudit:
    """The audit that ``--audit`` asks for; its report goes to standard error, with all else that is not the guest's.

    Args:
        watch: go on until the guest ends, and report what changes.
    """

    def __init__(self, watch: bool) -> None:
        self._watch = watch
        self._process: subprocess.Popen[bytes] | None = None
        self._status: int | None = None

    def start(self) -> None:
        """Begin, without waiting for it."""
        import subprocess

        options = ("--watch", "10") if self._watch else ()
        self._process = subprocess.Popen(_command(*options), stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno())

    def finish(self, wait: bool = False) -> int | None:
        """Its exit status, once the guest has ended; None if it had not come to a verdict by then.

        Args:
            wait: for its verdict, as the guest's RAM is still there; one that watches has come to many.
        """
        if self._process is not None:
            import subprocess

            if wait and not self._watch:
                self._process.wait()
            elif not self._watch:
                # It may have spoken already, and only be on its way out.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_GRACE)
            if self._process.poll() is None:
                self._process.terminate()
            status = self._process.wait()
            self._process = None
            self._status = status if status >= 0 else None
        return self._status
