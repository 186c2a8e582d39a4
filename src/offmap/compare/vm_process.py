"""VMMs to try: ours, and an unmodified QEMU on the same memory."""

import json
import os
import re
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from offmap.audit.guest_ram import RamRange, Source
from offmap.audit.process import Process
from offmap.kvm import Kvm
from offmap.uapi.offmap_module import DEVICE

__all__ = ["QEMU", "Boot", "VmProcess", "device_ranges", "offmap_command", "qemu_clock", "qemu_command"]

QEMU = "qemu-unplugged"
"""Not one of our backends: an unmodified QEMU whose guest RAM is a mapping of /dev/offmap."""

REPORT = "report.json"
POWER_OFF_DEADLINE = 30.0
_NEVER = re.compile(r"(?!)")


@dataclass(frozen=True, slots=True)
class Boot:
    """What to boot; `memory_size` as both command lines take it, `kvm_clock` as ``offmap run`` does."""

    kernel: Path
    initrd: Path
    memory_size: str
    command_line: str
    kvm_clock: str = "auto"


def offmap_command(boot: Boot, backend: str, folder: Path) -> list[str]:
    """``offmap run``, which leaves its report in `folder`."""
    return [
        *(sys.executable, "-m", "offmap", "run"),
        *("--kernel", str(boot.kernel), "--initrd", str(boot.initrd), "--cmdline", boot.command_line),
        *("--memory", backend, "--memory-size", boot.memory_size, "--kvm-clock", boot.kvm_clock),
        *("--report", str(folder / REPORT)),
    ]


def qemu_command(boot: Boot) -> list[str]:
    """QEMU as docs/qemu.md has it: its RAM from /dev/offmap, and no kvm-clock unless it is asked for.

    Raises:
        OffmapError: KVM does not say how fast its TSC is.
    """
    clock, words = qemu_clock(boot.kvm_clock == "on")
    memory = f"memory-backend-file,id=ram,size={boot.memory_size},mem-path={DEVICE},share=on"
    return [
        *("qemu-system-x86_64", "-accel", "kvm", "-cpu", f"host,svm=off,vmx=off{clock}"),
        *("-M", "microvm,acpi=on,rtc=on,memory-backend=ram", "-object", memory, "-m", boot.memory_size),
        *("-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio"),
        *("-kernel", str(boot.kernel), "-initrd", str(boot.initrd)),
        *("-append", f"{boot.command_line} pci=off{words}"),
    ]


def qemu_clock(offered: bool) -> tuple[str, str]:
    """What makes QEMU offer kvm-clock, or not, exactly as ``offmap run --kvm-clock`` does (offmap.vmm.cpuid).

    Returns:
        To append to its ``-cpu``, and to the guest kernel's command line: without kvm-clock a microvm has no clock that
        its guest could know the frequency of the TSC from.

    Raises:
        OffmapError: KVM does not say how fast its TSC is.
    """
    if offered:
        return "", ""
    # Bits 0, 3 (both kvmclock) and 24 of leaf 0x40000001 (feature_word_info in QEMU's target/i386/cpu.c), no others.
    return ",kvmclock=off,kvmclock-stable-bit=off", f" tsc_early_khz={guest_tsc_khz()} tsc=reliable"


def guest_tsc_khz() -> int:
    """The frequency of a guest's TSC in kHz, which it cannot find out by itself without kvm-clock.

    Raises:
        OffmapError: KVM does not say.
    """
    with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        return vcpu.tsc_khz()


def device_ranges(pid: int) -> list[RamRange]:
    """Where process `pid` has mapped /dev/offmap: all the guest RAM of a QEMU that `qemu_command` started."""
    with Process(pid) as process:
        return [
            RamRange(mapping.start, mapping.end - mapping.start, Source.REQUESTED)
            for mapping in process.maps()
            if mapping.path == DEVICE
        ]


class VmProcess:
    """A VMM as a process of its own, the guest's console on pipes; a context manager that leaves none behind.

    Args:
        argv: what to run.
        folder: for what it complains about, and for the report that `offmap run` writes.
    """

    def __init__(self, argv: Sequence[str], folder: Path) -> None:
        self._argv = list(argv)
        self._errors = folder / "stderr"
        self._report = folder / REPORT
        self._console = bytearray()

    def __enter__(self) -> Self:
        with self._errors.open("wb") as errors:
            self.started = time.monotonic()
            self._process = subprocess.Popen(
                self._argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, bufsize=0
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(POWER_OFF_DEADLINE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_for(self, pattern: re.Pattern[str], seconds: float) -> str:
        """Read the console until it matches, ends, or `seconds` have passed; returns all it said so far."""
        deadline = time.monotonic() + seconds
        console = self._process.stdout
        if console is None:
            return ""
        with selectors.DefaultSelector() as selector:
            selector.register(console, selectors.EVENT_READ)
            while (left := deadline - time.monotonic()) > 0 and selector.select(left):
                data = os.read(console.fileno(), 65536)
                self._console += data
                if not data:
                    self._process.wait()
                    break
                if pattern.search(self._text()):
                    break
        return self._text()

    def _text(self) -> str:
        return self._console.decode(errors="replace")

    def power_off(self) -> int | None:
        """Ask the guest's shell to; the VMM's exit status, or None if it did not end in time."""
        if self._process.stdin is not None:
            self._process.stdin.write(b"poweroff -f\n")
        self.wait_for(_NEVER, POWER_OFF_DEADLINE)  # to the end of the console
        return self._process.poll()

    def status(self) -> int | None:
        return self._process.poll()

    def complaint(self) -> str:
        """The VMM's last line on standard error, without the command's name."""
        lines = self._errors.read_text(errors="replace").strip().splitlines()
        return lines[-1].removeprefix("offmap run: ") if lines else ""

    def measured(self) -> dict[str, Any]:
        """What the VMM wrote down at its end."""
        try:
            data: dict[str, Any] = json.loads(self._report.read_text())
        except (OSError, ValueError):
            return {}
        return data
