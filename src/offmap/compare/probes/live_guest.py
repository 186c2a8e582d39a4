"""A guest that answers: the comparison's guest in a VMM of its own, commanded over its console."""

import os
import re
import selectors
import time
from pathlib import Path

from offmap.audit.btf import PATH as KERNEL_BTF
from offmap.audit.guest_ram import RamRange, named_ranges
from offmap.compare.facts import Guest
from offmap.compare.guest import CLOCKSOURCE, PLANTED, READY, SECRET
from offmap.compare.kinds import Vmm
from offmap.compare.libvirt_guest import qemu_pid
from offmap.compare.probes.guest_program import ProbeError, parse_answer
from offmap.compare.probes.survey import measured, undetermined, yes
from offmap.compare.questions import Answer
from offmap.compare.vm_process import VmProcess
from offmap.compare.vmm_command import GuestSetup, qemu_ranges, vmm_command
from offmap.errors import BackendRefused, ExitStatus, OffmapError
from offmap.patience import scaled

PATIENCE = 30.0
"""Seconds for one command on an idle, fast machine; a command takes a fraction of one."""

_BOOT_DEADLINE = 120.0  # seconds on an idle, fast machine; under emulation it takes 3 to 20
_READY = re.compile(re.escape(READY) + r", Linux (\S+)\r?\n")
_PLANTED = re.compile(PLANTED.format(r"(\d+)") + r"\r?\n")
_SECRET = re.compile(re.escape(SECRET) + r" ([0-9a-f]{64})\r?\n")
_CLOCKSOURCE = re.compile(re.escape(CLOCKSOURCE) + r" (\S+)")


class LiveGuest(VmProcess):
    """A guest, once `boot` returns; a context manager that leaves nothing behind.

    Args:
        folder: for what the VMM complains about and reports.

    Attributes:
        setup: what it is.
        facts: what its console says of it.
        boot_seconds: from the VMM's start until its init was ready.
        secret: the SHA-256 of what a process of it keeps; empty if it was not told to plant a secret.
    """

    def __init__(self, setup: GuestSetup, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(vmm_command(setup, folder), folder)
        self.setup = setup
        self._name = folder.name
        self.facts = Guest()
        self._planted = 0
        self.boot_seconds = 0.0
        self.secret = ""
        self._lost = ""
        self._begun = False
        self._qemu = -1

    @property
    def pid(self) -> int:
        """The process that has the guest's RAM mapped, also once it has ended; -1 if there never was one."""
        if self.setup.kind.vmm is not Vmm.LIBVIRT:
            return super().pid
        if self._qemu < 0:
            self._qemu = qemu_pid(self._name)
        return self._qemu

    def boot(self) -> str:
        """Wait until its init is ready; returns what its console said by then.

        Raises:
            BackendRefused: the VMM refused the RAM.
            OffmapError: it did not get so far.
        """
        limit = scaled(_BOOT_DEADLINE)
        console = self.wait_for(_READY, limit)
        booted = _READY.search(console)
        if booted is None:
            self._not_booted(console, limit)
            return ""
        self.boot_seconds = time.monotonic() - self.started
        planted = _PLANTED.search(console)
        self._planted = int(planted[1]) if planted else 0
        secret = _SECRET.search(console)
        self.secret = secret[1] if secret else ""
        clock = _CLOCKSOURCE.search(console)
        self.facts = Guest(booted[1], clock[1] if clock else "")
        return console

    def booted(self) -> list[Answer]:
        """That it booted, and how many secrets it says that it planted."""
        said = f"Linux {self.facts.kernel}, {self.setup.memory >> 20} MiB, init ready"
        return [yes("works.boot", said), measured("hidden.canaries_planted", self._planted)]

    def _not_booted(self, console: str, limit: float) -> None:
        status, complaint = self.status(), self.complaint()
        if status == ExitStatus.FAILED and complaint.startswith("refused: "):
            raise BackendRefused.from_line(complaint.removeprefix("refused: "))
        if status is not None:
            raise OffmapError(complaint or f"the VMM ended with status {status}")
        last = "".join(console.strip().splitlines()[-1:])
        raise OffmapError(f"the guest did not say it was ready within {limit:.0f} s; last: {last!r}")

    def begin(self) -> None:
        """Start the program at the console. Before any `command`. Raises ProbeError: it does not come up."""
        start = len(self._console)
        self._begun = True
        self._type("guest_program")
        self._answer("guest_program", start, PATIENCE)

    def command(self, line: str, seconds: float = PATIENCE) -> list[list[str]]:
        """Have the program do something; returns the words of each result.

        Raises:
            ProbeError: it failed, with the guest's errno, or the guest is not there any more.
        """
        if self._lost:
            raise ProbeError(self._lost)
        start = len(self._console)
        self._type(line)
        return self._answer(line, start, seconds)

    def value(self, line: str, seconds: float = PATIENCE) -> float:
        """Have the program do something whose only result is one number; returns that."""
        results = self.command(line, seconds)
        if len(results) != 1 or len(results[0]) != 1:
            raise ProbeError(f"the guest answered {line!r} with {results!r}")
        return float(results[0][0])

    def shell(self, line: str, seconds: float = PATIENCE) -> str:
        """Run a line in the guest's shell; returns what it wrote.

        Raises:
            ProbeError: it ended with another status than 0.
        """
        if self._lost:
            raise ProbeError(self._lost)
        start = len(self._console)
        self._type(f"sh {line}")
        self._answer(line, start, seconds)
        said = bytes(self._console[start:]).decode(errors="replace").replace("\r\n", "\n")
        return said.partition("offmap-probe: done")[0].strip()

    def check_alive(self) -> None:
        """Before something is done to it, as one that is gone already outlives nothing.

        Raises:
            ProbeError: it does not answer.
        """
        self.command("clock")

    def is_alive(self) -> bool:
        """Whether it still answers."""
        try:
            self.check_alive()
        except ProbeError:
            return False
        return True

    def ranges(self) -> list[RamRange] | None:
        """Where its RAM is, if KVM's own list does not say so."""
        if self.setup.kind.vmm.is_qemu:
            return qemu_ranges(self.pid, self.setup.kind)
        # A kernel that does not describe its structures (the lab's own) shows no list. Our VMM's word does here.
        return None if self.setup.kind.vmm is not Vmm.OFFMAP or Path(KERNEL_BTF).exists() else named_ranges(self.pid)

    def end(self) -> None:
        """Have the guest power itself off. Raises OffmapError: the VMM did not end in time, or not well."""
        # Firecracker has nothing to power off. It ends when its guest resets.
        end = "reboot -f" if self.setup.kind.vmm is Vmm.FIRECRACKER else "poweroff -f"
        self._type(f"sh /bin/busybox {end}" if self._begun else end)
        status = self.wait()
        if status != ExitStatus.DONE:
            raise OffmapError(f"the VMM ended with status {status}: {self.complaint()}")

    def ram_ready(self) -> Answer:
        """How long its VMM took to get its RAM, once it has ended."""
        seconds = self.populate_seconds()
        if seconds is None:
            return undetermined("costs.ram_ready", "this VMM does not tell")
        return measured(
            "costs.ram_ready", seconds, detail="zeroed where it must be, before the guest's first instruction"
        )

    def _type(self, line: str) -> None:
        stdin = self._process.stdin
        try:
            if stdin is not None:
                stdin.write(line.encode() + b"\n")
        except OSError:
            self._lost = f"the VMM has ended: {self.complaint() or 'it said nothing'}"
            raise ProbeError(self._lost) from None

    def _answer(self, line: str, start: int, seconds: float) -> list[list[str]]:
        seconds = scaled(seconds)
        deadline = time.monotonic() + seconds
        stdout = self._process.stdout
        with selectors.DefaultSelector() as selector:
            if stdout is not None:
                selector.register(stdout, selectors.EVENT_READ)
            while True:
                answer = parse_answer(bytes(self._console[start:]).decode(errors="replace"))
                if answer is not None:
                    results, error, text = answer
                    if error:
                        raise ProbeError(f"in the guest, {line.partition(' ')[0]!r} failed: {text or error}")
                    return results
                left = deadline - time.monotonic()
                if stdout is None or left <= 0 or not selector.select(left):
                    self._lost = f"the guest did not answer {line!r} within {seconds:.0f} s"
                    raise ProbeError(self._lost)
                data = os.read(stdout.fileno(), 65536)
                self._console += data
                if not data:
                    self._process.wait()
                    self._lost = f"the VMM has ended: {self.complaint() or 'it said nothing'}"
                    raise ProbeError(self._lost)
