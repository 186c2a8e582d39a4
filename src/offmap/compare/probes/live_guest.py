"""A guest that answers: the comparison's guest in a VMM of its own, commanded over its console."""

import os
import re
import selectors
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from offmap.audit.guest_ram import RamRange, Source
from offmap.audit.process import Process
from offmap.compare.guest import READY
from offmap.compare.probes.guest_program import ProbeError, parse_answer
from offmap.compare.vm_process import POWER_OFF_DEADLINE, QEMU, VmProcess, device_ranges, qemu_clock
from offmap.errors import BackendRefused, ExitStatus, OffmapError
from offmap.lab.qemu import find_qemu
from offmap.uapi.offmap_module import DEVICE

__all__ = ["BASELINE", "MEMORY_SIZE", "PATIENCE", "QEMU_BASELINE", "GuestSetup", "LiveGuest", "card_mac", "vmm_command"]

BASELINE = "memfd"
"""The plain RAM that everything is compared with, in the same host."""

QEMU_BASELINE = "qemu-memfd"
"""The same for QEMU, so that VMMs are not what is compared."""

MEMORY_SIZE = 256 << 20
"""Bytes of RAM of each guest. A Debian kernel wants 56 MiB in one piece, which aliased pages may leave few of."""

PATIENCE = 30.0
"""Seconds for one command, which takes a fraction of one."""

_BOOT_DEADLINE = 120.0  # seconds; under emulation it takes 3 to 20
_QEMU_MEMFD = "/memfd:memory-backend-memfd"  # backends/hostmem-memfd.c
_NEVER = re.compile(r"(?!)")
_READY = re.compile(re.escape(READY) + r", Linux (\S+)\r?\n")


@dataclass(frozen=True, slots=True)
class GuestSetup:
    """One guest.

    Attributes:
        backend: as ``offmap run --memory`` has it, QEMU, or QEMU_BASELINE.
        words: for its kernel's command line.
        kvm_clock: on, off, or auto.
        disk: a raw image for its /dev/vda.
        taps: a network interface for each, by the name of the host's side, and how vhost is to be: on or off.
        vsock: the host's socket, of ``offmap run --vsock``; QEMU's is the host kernel's.
        cid: its context id there.
        balloon: bytes; None: no such device.
    """

    backend: str
    kernel: Path
    initrd: Path
    words: str = ""
    vcpus: int = 1
    kvm_clock: str = "auto"
    disk: Path | None = None
    taps: Sequence[tuple[str, str]] = field(default=())
    vsock: Path | None = None
    cid: int = 9
    balloon: int | None = None


def vmm_command(setup: GuestSetup) -> list[str]:
    """What runs it.

    Raises:
        OffmapError: there is no QEMU, or KVM does not say how fast its TSC is.
    """
    command_line = f"console=ttyS0 quiet {setup.words}".strip()
    size = str(MEMORY_SIZE)
    if setup.backend in {QEMU, QEMU_BASELINE}:
        return _qemu(setup, command_line, size)
    argv = [sys.executable, "-m", "offmap", "run", "--kernel", str(setup.kernel), "--initrd", str(setup.initrd)]
    argv += ["--cmdline", command_line, "--memory", setup.backend, "--memory-size", size]
    argv += ["--vcpus", str(setup.vcpus), "--kvm-clock", setup.kvm_clock]
    if setup.disk is not None:
        argv += ["--drive", str(setup.disk)]
    for number, (name, vhost) in enumerate(setup.taps):
        argv += ["--net", f"tap={name},vhost={vhost},mac={card_mac(number)}"]
    if setup.vsock is not None:
        argv += ["--vsock", f"cid={setup.cid},path={setup.vsock}"]
    if setup.balloon is not None:
        argv += ["--balloon", f"size={setup.balloon}"]
    return argv


def card_mac(number: int) -> str:
    """The address of a guest's n-th card, to be known by: in which order its kernel finds them is the VMM's affair."""
    return f"02:00:00:00:00:{number:02x}"


def _qemu(setup: GuestSetup, command_line: str, size: str) -> list[str]:
    """As docs/qemu.md has it: its RAM from /dev/offmap, and no kvm-clock unless it is asked for."""
    clock, words = qemu_clock(setup.kvm_clock == "on")
    cpu = f"host,svm=off,vmx=off{clock}"
    command_line += f" pci=off{words}"
    kind = f"memory-backend-file,mem-path={DEVICE}" if setup.backend == QEMU else "memory-backend-memfd"
    memory = f"{kind},id=ram,size={size},share=on"
    argv = [find_qemu(), "-accel", "kvm", "-cpu", cpu, "-M", "microvm,acpi=on,rtc=on,memory-backend=ram"]
    argv += ["-object", memory, "-m", f"size={int(size) >> 20}M", "-smp", str(setup.vcpus)]
    argv += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio"]
    argv += ["-global", "virtio-mmio.force-legacy=false"]
    argv += ["-kernel", str(setup.kernel), "-initrd", str(setup.initrd), "-append", command_line]
    devices = []
    if setup.disk is not None:
        argv += ["-drive", f"id=disk,file={setup.disk},format=raw,if=none,cache=writeback"]
        devices += ["virtio-blk-device,drive=disk"]
    for number, (name, vhost) in enumerate(setup.taps):
        argv += ["-netdev", f"tap,id=net{number},ifname={name},script=no,downscript=no,vhost={vhost}"]
        devices += [f"virtio-net-device,netdev=net{number},mac={card_mac(number)}"]
    if setup.vsock is not None:
        devices += [f"vhost-vsock-device,guest-cid={setup.cid}"]
    for device in devices:
        argv += ["-device", device]
    return argv


class LiveGuest(VmProcess):
    """A guest, booted and with the program running at its console; a context manager that leaves nothing behind.

    Args:
        folder: for what the VMM complains about.

    Attributes:
        setup: what it is.
        release: ``uname -r`` in it.
        boot_seconds: from the VMM's start until its init was ready.
    """

    def __init__(self, setup: GuestSetup, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(vmm_command(setup), folder)
        self.setup = setup
        self.release = ""
        self.boot_seconds = 0.0
        self._lost = ""

    def boot(self) -> str:
        """Wait until its init is ready; returns what its console said by then.

        Raises:
            BackendRefused: the VMM refused the RAM.
            OffmapError: it did not get so far.
        """
        console = self.wait_for(_READY, _BOOT_DEADLINE)
        booted = _READY.search(console)
        if booted is None:
            self._not_booted(console)
            return ""
        self.boot_seconds = time.monotonic() - self.started
        self.release = booted[1]
        return console

    def _not_booted(self, console: str) -> None:
        status, complaint = self.status(), self.complaint()
        if status == ExitStatus.FAILED and complaint.startswith("refused: "):
            raise BackendRefused(complaint.removeprefix("refused: "))
        if status is not None:
            raise OffmapError(complaint or f"the VMM ended with status {status}")
        last = "".join(console.strip().splitlines()[-1:])
        raise OffmapError(f"the guest did not say it was ready within {_BOOT_DEADLINE:.0f} s; last: {last!r}")

    def begin(self) -> None:
        """Start the program at the console. Before any `command`.

        Raises:
            ProbeError: it does not come up.
        """
        start = len(self._console)
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
        """The same, where the only result is one number."""
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
        """Where its RAM is, if the VMM itself does not say so."""
        if self.setup.backend == QEMU:
            return device_ranges(self.pid)
        if self.setup.backend == QEMU_BASELINE:
            with Process(self.pid) as process:
                return [
                    RamRange(mapping.start, mapping.end - mapping.start, Source.REQUESTED)
                    for mapping in process.maps()
                    if mapping.path.startswith(_QEMU_MEMFD)
                ]
        return None

    def power_off(self) -> int | None:
        """Have the guest power itself off; the VMM's exit status, or None if it did not end in time."""
        self._type("sh /bin/busybox poweroff -f")
        self.wait_for(_NEVER, POWER_OFF_DEADLINE)  # to the end of the console
        return self.status()

    def _type(self, line: str) -> None:
        stdin = self._process.stdin
        try:
            if stdin is not None:
                stdin.write(line.encode() + b"\n")
        except OSError:
            self._lost = f"the VMM has ended: {self.complaint() or 'it said nothing'}"
            raise ProbeError(self._lost) from None

    def _answer(self, line: str, start: int, seconds: float) -> list[list[str]]:
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
