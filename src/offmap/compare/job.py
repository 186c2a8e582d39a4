"""What is asked of the program that measures one cell, and the lines that it says in answer.

It is run as root on the host that the cell is about, a disposable one (``$OFFMAP_LAB`` is set) or this machine's, as
``python -m offmap.compare.measure JOB_JSON``; without an argument it takes a job from each line of its input. It prints
one line of JSON, a `Line`, as soon as it knows something: the host first, the outcome last. It exits with 0 once it
has said the outcome of its last job, whichever that is.
"""

from msgspec import UNSET, Struct, UnsetType

from offmap.compare.cell_result import CellOutcome
from offmap.compare.facts import Guest, Host
from offmap.compare.questions import Answer
from offmap.compare.spec import NATIVE, CellSpec


class Preset(Struct, frozen=True):
    """How much is asked of a cell, and the host that it needs.

    Attributes:
        questions: what is asked: one look at the guest after its boot, without another guest beside it. Empty: all.
        canaries: how many secrets each guest plants.
        memory: the disposable host's RAM, as QEMU writes sizes.
        cmdline: appended to its kernel command line.
        fresh: whether it must have booted for this cell: its boot, its direct map or its allocator is measured. If
            not, it may go on from a snapshot, and may have had other cells before.
    """

    questions: tuple[str, ...] = ()
    canaries: int = 32
    memory: str = "2G"
    # 256 MiB at 1.5 GiB that Linux never owns, for `reserved`. Every host has it, so that all are alike.
    # Linux before 6.5 has no memfd_secret unless it is told to (secretmem.enable).
    cmdline: str = "memmap=256M$0x60000000 secretmem.enable=1"
    fresh: bool = True


FULL = Preset()


class Job(Struct, frozen=True):
    """One cell, and what this machine has for it.

    Attributes:
        spec: which cell.
        guest_vmlinuz: path of the guest's kernel.
        initrd: path of the guest's initramfs.
        folder: an empty folder to write to; it is removed after the cell.
        boots: pairs of guests to boot for the time it takes, by turns; with 1, only what boots anyway is timed.
        preset: how much is asked.
    """

    spec: CellSpec
    guest_vmlinuz: str
    initrd: str
    folder: str
    boots: int = 1
    preset: Preset = FULL

    @property
    def native(self) -> bool:
        """Whether the host is the machine itself: nothing may be done that could harm it."""
        return self.spec.host_kernel == NATIVE


class Line(Struct, frozen=True):
    """One line that the program says; it has one of these parts, or two that belong together.

    Attributes:
        host: the host that it runs on.
        guest: the guest that the cell is about.
        stage: what it does now, for the display.
        share: of the stage, from 0 to 1.
        question: it now asks that; whatever ends the host is then known to be due to it.
        answer: a later answer to the same question replaces the first.
        outcome: ``booted``, ``refused`` or ``failed``.
        reason: of the outcome.
    """

    host: Host | UnsetType = UNSET
    guest: Guest | UnsetType = UNSET
    stage: str | UnsetType = UNSET
    share: float | UnsetType = UNSET
    question: str | UnsetType = UNSET
    answer: Answer | UnsetType = UNSET
    outcome: CellOutcome | UnsetType = UNSET
    reason: str | UnsetType = UNSET
