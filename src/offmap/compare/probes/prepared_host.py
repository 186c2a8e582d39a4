"""The host, made ready for a cell: what the guests boot, their disks and interfaces, and what the host was before."""

import contextlib
import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from offmap.compare.guest import PLANT_SECRET
from offmap.compare.job import Job
from offmap.compare.kinds import Vmm, kind_of
from offmap.compare.probes import devices, hidden, host_events
from offmap.compare.probes.host_kernel import host_memory_kib, load_modules, write_knob
from offmap.compare.probes.network import Subnet, tap
from offmap.compare.vmm_command import MEMORY_SIZE, GuestSetup
from offmap.devices.virtio.balloon import BalloonSpec
from offmap.devices.virtio.device import Surroundings
from offmap.errors import BackendRefused, OffmapError
from offmap.kvm import Kvm
from offmap.memory.hugetlb import Hugetlb
from offmap.memory.probe import try_out
from offmap.owned import Owned
from offmap.vmm.pvclock import is_safe_on_hidden_memory

SKIPPED_NATIVE = "it would change this machine, which is nobody's to throw away"

TRIED_SIZE = 4 << 20
"""Bytes of RAM to try a kind with: whole huge pages, and little enough for any host."""

_HUGE_PAGES = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"
_CARDS = ("ofcard", "ofvhost", "ofplain", "ofplainvhost")
"""Of the guest that the cell is about and of the plain one, each without vhost and with it."""


def is_clock_offered(wanted: str, *, hides: bool, safe: bool) -> bool:
    """Whether the guest gets kvm-clock; by itself, wherever the host kernel can keep it on this RAM.

    Args:
        wanted: on, off or auto.
        hides: whether the RAM has no mapping in the host kernel.
        safe: whether this host's KVM keeps the clock by userspace address.
    """
    return wanted == "on" or (wanted == "auto" and (safe or not hides))


class PreparedHost(Owned):
    """Owns the interfaces.

    Args:
        folder: in memory, removed by the caller.

    Attributes:
        kind: of the guest that the cell is about.
        backend: makes its RAM.
        offers_clock: whether the guest gets kvm-clock.
        disks: of the guest that the cell is about, and of the plain one.
        why_no_network: empty where there are interfaces.
        cannot_discard: why single pages of this RAM cannot go back to the host; empty: they can.
        memory_kib, hibernation: what the host had, and could, before any guest.
    """

    def __init__(self, job: Job, folder: Path) -> None:
        self.job = job
        self.folder = folder
        self.secrets = hidden.Secrets(job.preset.canaries)
        self.kind = kind_of(job.spec.backend)
        self.backend = self.kind.backend()
        if self.kind.vmm is Vmm.FIRECRACKER:
            self.offers_clock = not self.kind.is_wrapped
        else:
            self.offers_clock = is_clock_offered(
                job.spec.kvm_clock, hides=self.backend.hides, safe=is_safe_on_hidden_memory()
            )
        self.hibernation = host_events.hibernation_offered()
        self._initrd = folder / "guest.initramfs"
        self._initrd.write_bytes(Path(job.initrd).read_bytes())
        self.disks = [devices.make_disk(folder / f"disk{number}") for number in range(2)]
        if self.kind.backend is Hugetlb and not job.native:
            write_knob(_HUGE_PAGES, str(2 * MEMORY_SIZE >> 21))  # for what is taken before the last has all gone back
        self.memory_kib = host_memory_kib()
        self.cannot_discard = ""
        self._owned = ExitStack()
        self._subnets: list[Subnet] = []
        self.why_no_network = f"not measured: {SKIPPED_NATIVE}" if job.native else self._make_taps()

    def _make_taps(self) -> str:
        try:
            load_modules("tun", "vhost_net")
            for number, name in enumerate(_CARDS):
                self._subnets.append(Subnet(number))
                self._owned.enter_context(tap(name, self._subnets[-1]))
            if self.kind.vmm.is_qemu:
                load_modules("vhost_vsock")
        except OffmapError as error:
            return str(error)
        return ""

    def subnets(self) -> list[Subnet]:
        """Of the guest's card, of its card with vhost, and of the plain guest's two.

        Raises:
            OffmapError: there are none.
        """
        if self.why_no_network:
            raise OffmapError(self.why_no_network)
        return self._subnets

    @property
    def withholds_clock(self) -> bool:
        """Whether kvm-clock is asked for where offmap does not offer it."""
        wanted = self.job.spec.kvm_clock == "on" and self.kind.vmm is Vmm.OFFMAP
        return wanted and self.backend.hides and not is_safe_on_hidden_memory()

    def try_out(self) -> None:
        """Run one instruction on this RAM: a refusal ends the cell before anything is booted.

        Raises:
            BackendRefused: this host does not give such RAM, or not with kvm-clock.
        """
        if self.withholds_clock:
            raise BackendRefused(
                f"kvm-clock is not offered on {self.backend.name} memory",
                "this host's kernel must map its page",
                "use kvm_clock=off, or a kernel that updates it by userspace address",
            )
        with Kvm() as kvm, kvm.create_vm() as vm, self.backend.guest_memory(vm, TRIED_SIZE) as memory:
            try_out(vm, memory)
            try:
                BalloonSpec(1 << 20).build(Surroundings(memory, type(self.backend), vm))
            except OffmapError as error:
                self.cannot_discard = error.reason

    def candidate(self) -> GuestSetup:
        """The guest that the cell is about."""
        spec = self.job.spec
        return GuestSetup(
            self.kind,
            Path(self.job.guest_vmlinuz),
            self._initrd,
            words=f"clocksource=kvm-clock {self.secrets.of_candidate} {PLANT_SECRET}",
            vcpus=spec.vcpus,
            kvm_clock="on" if self.offers_clock else "off",
            disk=self.disks[0].path,
            taps=self._taps(0),
            vsock=self.folder / "vsock",
            balloon=None if self.cannot_discard or self.kind.vmm is not Vmm.OFFMAP else devices.BALLOON,
            firecracker=Path(self.job.firecracker),
            vmlinux=Path(self.job.guest_vmlinux),
        )

    def plain(self) -> GuestSetup:
        """The plain guest, baseline and control: the same in all but its RAM, as each device costs the others time."""
        return replace(
            self.candidate(),
            kind=self.kind.baseline,
            words=f"clocksource=kvm-clock {self.secrets.of_control} {PLANT_SECRET}",
            disk=self.disks[1].path,
            taps=self._taps(2),
            vsock=self.folder / "vsock-plain",
            cid=10,
        )

    def _taps(self, first: int) -> list[tuple[str, str]]:
        return [] if self.why_no_network else [(_CARDS[first], "off"), (_CARDS[first + 1], "on")]

    @staticmethod
    def bare(setup: GuestSetup, vcpus: int) -> GuestSetup:
        """A guest on the same RAM, without devices and secrets."""
        return replace(setup, words="", vcpus=vcpus, disk=None, taps=[], vsock=None, balloon=None)

    def direct_file(self) -> Path:
        """A disk or file to read past the page cache; the folder's is on 9p in a lab host, which pins pages as well."""
        device = Path("/dev/ram0")
        if not self.job.native:
            with contextlib.suppress(OffmapError):
                load_modules("brd")
            if os.access(device, os.W_OK):
                return device
        path = Path(self.job.folder) / "direct"
        path.write_bytes(bytes(1 << 20))
        return path

    def close(self) -> None:
        self._owned.close()
