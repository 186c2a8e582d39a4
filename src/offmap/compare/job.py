"""The job of the program that measures one cell, and the lines that it prints.

The program runs as root on the cell's host: a disposable one (``$OFFMAP_LAB`` is set) or this machine. It is started as
``python -m offmap.compare.measure JOB_JSON``. Without an argument it takes a job from each line of its input. It prints
one line of JSON, a `Line`, as soon as it knows something: the host first, the outcome last. It exits with 0 once it has
printed the outcome of its last job, whichever that is.
"""

from msgspec import UNSET, Struct, UnsetType

from offmap.compare.cell_result import CellOutcome
from offmap.compare.facts import Guest, Host
from offmap.compare.questions import Answer
from offmap.compare.spec import NATIVE, CellSpec


class Preset(Struct, frozen=True):
    """How much is asked of a cell, and the host that it needs.

    Attributes:
        questions: those of one look at the guest after its boot, without another guest beside it. Empty: all.
        canaries: how many secrets each guest plants.
        attacked: the kinds of RAM whose guest is attacked after that look, beside a plain guest. A whole cell's always
            is.
        memory: the disposable host's RAM, as QEMU writes sizes.
        cmdline: appended to its kernel command line.
        unpacked: whether ``offmap run`` gets the guest's kernel as an ELF file, as Firecracker does: such a guest has
            no KASLR, and boots in less time. Where it cannot be unpacked here, the guest gets it as it is.
        fresh: whether the host must boot for this cell, as its boot, direct map or allocator is measured. If not, it
            may start from a snapshot, and may have run other cells before.
    """

    questions: tuple[str, ...] = ()
    canaries: int = 32
    attacked: tuple[str, ...] = ()
    memory: str = "2G"
    # 256 MiB at 1.5 GiB that Linux never owns, for `reserved`. All hosts have it, so that they are alike.
    # Linux before 6.5 has no memfd_secret unless it is told to (secretmem.enable).
    cmdline: str = "memmap=256M$0x60000000 secretmem.enable=1"
    unpacked: bool = False
    fresh: bool = True


FULL = Preset()


class Job(Struct, frozen=True):
    """One cell, and what this machine has for it.

    Attributes:
        spec: which cell.
        guest_vmlinuz: path of the guest's kernel.
        firecracker: of kinds under Firecracker: the program.
        guest_vmlinux: the guest's kernel as an ELF file, where that is what its VMM gets.
        libvirt: of kinds under libvirt: the folder of its unpacked packages.
        initrd: path of the guest's initramfs.
        folder: an empty folder to write to; it is removed after the cell.
        boots: how many pairs of guests to boot by turns, to time the boot. With 1, no extra guest is booted.
        preset: how much is asked.
        host_known, guest_known: paths of files that say what an attacker knows of the two kernels; empty: no attack.
        not_known: why there are no such files; empty if none are needed.
    """

    spec: CellSpec
    guest_vmlinuz: str
    initrd: str
    folder: str
    boots: int = 1
    preset: Preset = FULL
    host_known: str = ""
    guest_known: str = ""
    not_known: str = ""
    firecracker: str = ""
    guest_vmlinux: str = ""
    libvirt: str = ""

    @property
    def native(self) -> bool:
        """Whether the host is this machine itself, which must not be harmed."""
        return self.spec.host_kernel == NATIVE


class Line(Struct, frozen=True):
    """One line that the program prints: one of these fields, or two that belong together.

    Attributes:
        host: the host that it runs on.
        guest: the guest that the cell is about.
        stage: what the program does now, for the display.
        share: done of the stage, from 0 to 1.
        question: what is asked now. If the host ends, this question ended it.
        answer: replaces an earlier answer to the same question.
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
