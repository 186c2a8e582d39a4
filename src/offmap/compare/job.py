"""What is asked of the program that measures one cell, and what it says in answer.

It is run as root on the host that the cell is about, a disposable one (``$OFFMAP_LAB`` is set) or this machine's, as
``python -m offmap.compare.measure JOB_JSON``, and prints a line of JSON as soon as it knows something:

- ``{"host": {…}}``: offmap.audit.host.HostFacts, first of all;
- ``{"stage": "…", "share": 0.5}``: what it is doing, for the progress display; the share may be left out;
- ``{"question": "costs.boot"}``: it now asks that; what ends the host is then known to be due to it;
- ``{"answer": {…}}``: an Answer. A later answer to the same question replaces the first;
- ``{"outcome": "booted" | "refused" | "failed", "reason": "…"}``: last of all.

It exits with 0 once it has said the outcome, whichever that is.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from offmap.compare.matrix import NATIVE, CellSpec

__all__ = ["Job"]


@dataclass(frozen=True, slots=True)
class Job:
    """One cell, and what this machine has for it.

    Attributes:
        spec: which cell.
        guest_vmlinuz: the guest's kernel.
        guest_modules: its ``lib/modules/RELEASE`` folder; may be absent where all that is needed is built in.
        guest_release: what ``uname -r`` says in it.
        folder: an empty folder to write to; it is removed after the cell.
        boots: pairs of guests to boot for the time it takes, by turns; with 1, only what boots anyway is timed.
    """

    spec: CellSpec
    guest_vmlinuz: Path
    guest_modules: Path
    guest_release: str
    folder: Path
    boots: int = 1

    @property
    def native(self) -> bool:
        """Whether the host is the machine itself: nothing may be done that could harm it."""
        return self.spec.host_kernel == NATIVE

    def dumps(self) -> str:
        """As the program's argument."""
        rest = {
            "guest_vmlinuz": str(self.guest_vmlinuz),
            "guest_modules": str(self.guest_modules),
            "guest_release": self.guest_release,
            "folder": str(self.folder),
            "boots": self.boots,
        }
        return json.dumps({"spec": self.spec.to_json(), **rest})

    @classmethod
    def loads(cls, text: str) -> Self:
        """What `dumps` gave.

        Raises:
            ValueError: it is no such thing.
        """
        data: Any = json.loads(text)
        if not isinstance(data, Mapping):
            raise ValueError("no job: not an object")
        try:
            return cls(
                CellSpec.from_json(data["spec"]),
                Path(data["guest_vmlinuz"]),
                Path(data["guest_modules"]),
                str(data["guest_release"]),
                Path(data["folder"]),
                int(data.get("boots", 1)),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"no job: {error!r}") from None
