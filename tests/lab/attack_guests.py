"""Guests of several kinds of RAM and VMMs, each with a planted secret, for attacks in a disposable host."""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from offmap.attack.attack import Victim
from offmap.attack.sweep import parse_pieces
from offmap.attack.target import PlantedSecret
from offmap.compare.kinds import kind_of
from offmap.compare.vm_process import VmProcess
from offmap.compare.vmm_command import GuestSetup, guest_tsc_khz, vmm_command
from offmap.lab.qemu import find_qemu
from offmap.patience import scaled

DEADLINE = scaled(120.0)
SECRET = re.compile(r"(?s)offmap-guest: pieces ([0-9a-f,]+)\s.*offmap-guest: secret ([0-9a-f]{64})")
READY = re.compile(r"(?s)(?=.*offmap-guest: secret [0-9a-f]{64}).*offmap-guest: ready")
PLANT = "OFFMAP_SECRET=1"
OFFMAP = [sys.executable, "-m", "offmap"]
HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")
READ_DRIVES = "rdinit=/read-drives"
"""The guest then reads its drives before anything else, and says their digests (`test_attack.with_drives`)."""


@dataclass(frozen=True)
class Planted:
    """A planted secret: the PID of the VMM; the secret's digest, and it in pieces; what the guest said."""

    pid: int
    digest: str
    pieces: str
    said: str = ""

    def victim(self, sweep: bool = False) -> Victim:
        return Victim(self.pid, PlantedSecret("sh", self.digest), parse_pieces(self.pieces) if sweep else None)


@dataclass(frozen=True)
class Boot:
    """What guests boot.

    Attributes:
        vmlinux: the kernel as Firecracker takes it.
        firecracker: the program.
        drives: those of a guest on `reserved` RAM.
    """

    kernel: str
    initrd: str
    vmlinux: str = ""
    firecracker: str = ""
    drives: tuple[str, ...] = ()

    def command(self, kind: str, folder: Path) -> list[str]:
        """What runs a guest of a kind of ``offmap compare``'s, or of one of these."""
        pool = "memory-backend-file,id=ram,size=256M,mem-path=/run/hidden,share=on,align=2M"
        match kind:
            case "qemu-anon":
                return self._qemu()
            case "qemu-pool":
                return [*self._qemu(), "-cpu", "host,kvmclock=off", "-object", pool, "-M", "q35,memory-backend=ram"]
            case "wrapped-qemu":
                return [*OFFMAP, "wrap", "--", *self._qemu()]
            case "wrapped-firecracker":
                return [*OFFMAP, "wrap", "--", *self._firecracker(folder)]
            case "wrapped-firecracker-pool":
                return [*OFFMAP, "wrap", "--memory", "pool", "--", *self._firecracker(folder)]
            case "reserved" if self.drives:
                drives = [word for each in self.drives for word in ("--drive", each)]
                return [*self._offmap("reserved", folder, READ_DRIVES), *drives]
        return self._offmap(kind, folder)

    def _offmap(self, kind: str, folder: Path, *words: str) -> list[str]:
        setup = GuestSetup(kind_of(kind), Path(self.kernel), Path(self.initrd), words=" ".join([PLANT, *words]))
        return vmm_command(setup, folder)

    def _qemu(self) -> list[str]:
        """QEMU with ordinary private memory."""
        argv = [find_qemu(), "-nodefaults", "-no-user-config", "-display", "none", "-accel", "kvm", "-m", "256M"]
        argv += ["-M", "q35", "-cpu", "host", "-kernel", self.kernel, "-initrd", self.initrd, "-serial", "stdio"]
        return [*argv, "-append", f"console=ttyS0 quiet {PLANT}"]

    def _firecracker(self, folder: Path) -> list[str]:
        """Firecracker; its guest has no clock but the TSC, and nothing to measure that by."""
        # The output folder is uncached 9p, which cannot read into hidden memory.
        kernel, initrd = (shutil.copy(path, folder) for path in (self.vmlinux, self.initrd))
        words = "console=ttyS0 quiet reboot=k panic=1 pci=off i8042.noaux i8042.nomux i8042.dumbkbd"
        words += f" tsc=reliable tsc_early_khz={guest_tsc_khz()} {PLANT}"
        source = {"kernel_image_path": kernel, "initrd_path": initrd, "boot_args": words}
        machine = {"vcpu_count": 1, "mem_size_mib": 128}
        config = folder / "config"
        config.write_bytes(msgspec.json.encode({"boot-source": source, "drives": [], "machine-config": machine}))
        (log := folder / "log").touch()
        settings = ["--no-api", "--config-file", str(config), "--log-path", str(log)]
        return [self.firecracker, *settings]


@contextmanager
def prepared(kind: str) -> Iterator[None]:
    """The host, made ready for a kind."""
    if kind.endswith("pool"):
        subprocess.run([*OFFMAP, "pool", "create", "256M", "--allow-nested"], check=True, stdout=sys.stderr)
    if kind == "hugetlb":
        HUGE_PAGES.write_text("128")
    yield
    if kind == "hugetlb":
        HUGE_PAGES.write_text("0")
    if kind.endswith("pool"):
        subprocess.run([*OFFMAP, "pool", "destroy"], check=True)


def start(stack: ExitStack, kind: str, boot: Boot) -> Planted:
    """Start a guest that plants a secret."""
    stack.enter_context(prepared(kind))
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/run")))
    vmm = stack.enter_context(VmProcess(boot.command(kind, folder), folder))
    said = vmm.wait_for(READY, DEADLINE)
    match = SECRET.search(said)
    if match is None:
        raise SystemExit(f"{kind}: {vmm.complaint()}: {said[-2000:]}")
    return Planted(vmm.pid, match[2], match[1], said)
