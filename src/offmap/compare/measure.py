"""Measure one cell, on the host that it is about: ``python -m offmap.compare.measure JOB`` (offmap.compare.job).

Three guests: a plain one that stays all the time, baseline of every ratio and control of every scan; the one that the
cell is about, beside it; and, once that has ended, one of two vCPUs on the same RAM. What could end the host comes
last, as an oops costs only what follows.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from ipaddress import IPv4Interface
from pathlib import Path

from offmap.audit.guest_ram import RamRange
from offmap.audit.host import host_facts
from offmap.audit.verdict import Verdict
from offmap.compare.job import Job
from offmap.compare.probes import costs, devices, hidden, holder, host_events, paravirtual, reach
from offmap.compare.probes.asker import Asker, no, undetermined, yes
from offmap.compare.probes.guest_image import probe_initramfs
from offmap.compare.probes.host_kernel import direct_map_4k_kib, host_memory_kib, load_modules, write_knob
from offmap.compare.probes.live_guest import BASELINE, MEMORY_SIZE, GuestSetup, LiveGuest
from offmap.compare.probes.network import Subnet, tap
from offmap.compare.probes.vmm_memory import own_kib
from offmap.compare.questions import Answer
from offmap.compare.vm_process import QEMU
from offmap.devices.virtio.balloon_spec import BalloonSpec
from offmap.devices.virtio.device import Surroundings
from offmap.errors import BackendRefused, ExitStatus, OffmapError
from offmap.kvm import Kvm
from offmap.memory.backend import Backend, parse_backend
from offmap.memory.probe import try_out
from offmap.vmm.pvclock import is_safe_on_hidden_memory

__all__ = ["main"]

_HUGE_PAGES = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"
_NOT_LINUXS = frozenset({"reserved"})
"""Kinds whose memory was never the host kernel's."""

_SKIPPED_NATIVE = "it would change this machine, which is nobody's to throw away"


@dataclass
class _Findings:
    """What is learned early and needed late."""

    can_discard: str = ""  # why single pages cannot go back; empty: they can
    split_before: int | None = None
    memory_before: int = 0
    hibernation_before: tuple[bool | None, str] = (None, "")
    first: hidden.Sighting | None = None
    ranges: Sequence[RamRange] = ()
    split_with_guest: int | None = None


class _Cell:
    """One cell from its beginning to its end.

    Args:
        folder: in memory, removed by the caller.
    """

    def __init__(self, job: Job, asker: Asker, folder: Path) -> None:
        self.job = job
        self.asker = asker
        self.folder = folder
        self.spec = job.spec
        self.backend_name = "unplugged" if self.spec.backend == QEMU else self.spec.backend
        self.backend: Backend = parse_backend(self.backend_name)
        self.secrets = hidden.Secrets()
        self.found = _Findings()
        self.offers_clock = self.spec.kvm_clock == "on" or (self.spec.kvm_clock == "auto" and not self.backend.hides)
        self.taps: dict[str, Subnet] = {}

    def run(self) -> tuple[str, str]:
        """Ask everything; returns the outcome and its reason."""
        asker = self.asker
        asker.stage("preparing the host")
        self._prepare()
        try:
            self._try_out()
            with ExitStack() as stack:
                self._make_taps(stack)
                asker.stage("booting the plain guest")
                plain = stack.enter_context(LiveGuest(self._plain_setup(), self.folder / "plain"))
                plain.boot()
                plain.begin()
                self._with(plain, stack)
        except BackendRefused as error:
            if self.spec.kvm_clock == "on" and not self.job.native:
                self._provoke()
            return "refused", str(error)
        return "booted", ""

    # Preparation

    def _prepare(self) -> None:
        self.found.hibernation_before = host_events.hibernation_offered()
        self.found.split_before = self._split()
        self.initrd = self.folder / "guest.initramfs"
        self.initrd.write_bytes(probe_initramfs(self.job.guest_modules))
        self.disks = [devices.make_disk(self.folder / f"disk{number}") for number in range(2)]
        if self.spec.backend == "hugetlb" and not self.job.native:
            write_knob(_HUGE_PAGES, str(2 * MEMORY_SIZE >> 21))  # for two of them at a time
        self.found.memory_before = host_memory_kib()

    def _split(self) -> int | None:
        try:
            return direct_map_4k_kib()
        except OffmapError:
            return None

    def _try_out(self) -> None:
        """Run one instruction on this RAM: a refusal ends the cell before anything is booted.

        Raises:
            BackendRefused: this host does not give such RAM, or not with kvm-clock.
        """
        self.asker.say({"question": "works.boot"})
        wants_clock = self.spec.kvm_clock == "on" and self.spec.backend != QEMU
        if wants_clock and self.backend.hides and not is_safe_on_hidden_memory():
            raise BackendRefused(
                f"kvm-clock is not offered on {self.backend_name} memory: this host's kernel must map its page"
            )
        with Kvm() as kvm, kvm.create_vm() as vm, self.backend.guest_memory(vm, holder.SIZE) as memory:
            try_out(vm, memory)
            try:
                BalloonSpec(1 << 20).build(Surroundings(memory, self.backend.hides, vm))
            except OffmapError as error:
                self.found.can_discard = error.what

    def _make_taps(self, stack: ExitStack) -> None:
        if self.job.native:
            return
        try:
            load_modules("tun", "vhost_net")
            for number, name in enumerate(("ofcard", "ofvhost", "ofplain")):
                subnet = Subnet(number)
                stack.enter_context(tap(name, subnet))
                self.taps[name] = subnet
        except OffmapError as error:
            self.taps = {}
            self.no_network = str(error)
        if self.spec.backend == QEMU:
            try:
                load_modules("vhost_vsock")
            except OffmapError:
                return

    no_network = f"not measured: {_SKIPPED_NATIVE}"

    def _plain_setup(self) -> GuestSetup:
        return GuestSetup(
            BASELINE,
            self.job.guest_vmlinuz,
            self.initrd,
            f"clocksource=kvm-clock {self.secrets.of_control}",
            vcpus=self.spec.vcpus,
            kvm_clock="on" if self.offers_clock else "off",  # the same clock measures both
            disk=self.disks[1].path,
            taps=[("ofplain", "off")] if self.taps else [],
        )

    def _setup(self) -> GuestSetup:
        balloon = None if self.found.can_discard or self.spec.backend == QEMU else devices.BALLOON
        return replace(
            self._plain_setup(),
            backend=self.spec.backend,
            words=f"clocksource=kvm-clock {self.secrets.of_candidate}",
            kvm_clock=self.spec.kvm_clock,
            disk=self.disks[0].path,
            taps=[("ofcard", "off"), ("ofvhost", "on")] if self.taps else [],
            vsock=self.folder / "vsock",
            balloon=balloon,
        )

    # The guest

    def _with(self, plain: LiveGuest, stack: ExitStack) -> None:
        asker = self.asker
        asker.stage("booting the guest")
        before = self._split()
        with LiveGuest(self._setup(), self.folder / "guest") as guest:
            asker.say({"question": "works.boot"})
            try:
                console = guest.boot()
                guest.begin()
            except BackendRefused:
                raise
            except OffmapError as error:
                asker.tell(no("works.boot", str(error)))
                raise
            asker.tell(yes("works.boot", f"Linux {guest.release}, {MEMORY_SIZE >> 20} MiB, init ready"))
            asker.ask("costs.exits", lambda: costs.exits(guest, plain))
            boots = ([guest.boot_seconds], [plain.boot_seconds])
            asker.tell(costs.boots(*boots))
            self.found.split_with_guest = self._split()
            asker.stage("looking at it after its boot")
            self._look(guest, plain, hidden.AFTER_BOOT)
            if before is not None:
                asker.tell(self._split_answer("costs.direct_map_split", before, "while the guest runs"))
            guest.command("load virtio_mmio virtio_blk failover virtio_net vsock msr")
            plain.command("load virtio_mmio virtio_blk failover virtio_net")
            asker.stage("trying its devices")
            self._devices(guest, plain)
            asker.stage("asking for KVM's features")
            self._features(guest, console)
            asker.stage("measuring what it costs")
            self._costs(guest, plain)
            asker.stage("looking at it after I/O")
            self._look(guest, plain, hidden.AFTER_IO)
            asker.stage("trying what may break")
            self._breaks(guest)
            asker.ask("works.balloon", lambda: self._balloon(guest))
            if not self.offers_clock and not self.job.native:
                # May end the host.
                known = asker.answers["works.kvm_clock"]
                asker.ask("works.kvm_clock", lambda: paravirtual.forbidden_clock(guest, known))
            asker.stage("ending it")
            seen_raw = self._seen_raw()
            status = guest.power_off()
            if status != ExitStatus.DONE:
                raise OffmapError(f"the VMM ended with status {status}: {guest.complaint()}")
        asker.stage("looking at what it leaves")
        self._gone(plain, before, seen_raw)
        asker.stage("the same RAM without that guest")
        self._without_guest()

    def _look(self, guest: LiveGuest, plain: LiveGuest, ids: Sequence[str]) -> None:
        after_io = ids is hidden.AFTER_IO

        def probe() -> list[Answer]:
            sighting = hidden.look(guest, plain, self.secrets)
            self.found.first = self.found.first or sighting
            self.found.ranges = sighting.audit.ram.ranges
            answers = hidden.sightings(sighting, after_io=after_io)
            if not after_io:
                answers.append(Answer("hidden.canaries_planted", float(hidden.CANARIES)))
            return answers

        self.asker.ask_many(ids, probe)

    def _split_answer(self, id: str, before: int, when: str) -> Answer:
        now = self._split()
        return undetermined(id, "the kernel does not tell") if now is None else costs.split(id, now - before, when)

    def _devices(self, guest: LiveGuest, plain: LiveGuest) -> None:
        asker = self.asker
        asker.ask("works.virtio_blk", lambda: devices.virtio_blk(guest, self.disks[0]))
        if self.taps:
            asker.ask(
                "works.virtio_net",
                lambda: devices.virtio_net(guest, "eth0", self.taps["ofcard"], "works.virtio_net"),
            )
            asker.ask(
                "works.vhost_net", lambda: devices.virtio_net(guest, "eth1", self.taps["ofvhost"], "works.vhost_net")
            )
            address: IPv4Interface = self.taps["ofplain"].guest
            plain.shell(f"ifconfig eth0 {address.ip} netmask {address.netmask} up")
        else:
            asker.leave(("works.virtio_net", "works.vhost_net", "costs.net"), self.no_network)
        asker.ask("works.vsock", lambda: devices.vsock(guest))

    def _balloon(self, guest: LiveGuest) -> Answer:
        id = "works.balloon"
        if self.found.can_discard:
            return no(id, self.found.can_discard)
        if guest.setup.balloon is None:
            return undetermined(id, "not measured: QEMU's balloon was not tried")
        return devices.balloon(guest, list(self.found.ranges))

    def _features(self, guest: LiveGuest, console: str) -> None:
        asker = self.asker
        why = "" if self.offers_clock else "not offered: KVM writes its page by a kernel mapping"
        asker.ask("works.kvm_clock", lambda: paravirtual.kvm_clock(guest, console, why))
        asker.ask("works.steal_time", lambda: paravirtual.steal_time(guest))
        for id in ("works.async_pf", "works.pv_eoi"):
            asker.ask(id, lambda id=id: paravirtual.feature(guest, id))  # type: ignore[misc]
        if guest.setup.vcpus > 1:
            asker.ask("works.smp", lambda: devices.smp(guest))

    def _costs(self, guest: LiveGuest, plain: LiveGuest) -> None:
        asker = self.asker
        asker.ask(
            "costs.vmm_memory", lambda: costs.vmm_memory(own_kib(guest.pid, self.found.ranges), self._plain_kib(plain))
        )
        for id in costs.RATES:
            asker.ask(id, lambda id=id: costs.rates(id, guest, plain))  # type: ignore[misc]
        if self.taps:
            subnets = (self.taps["ofcard"], self.taps["ofplain"])
            asker.ask("costs.net", lambda: costs.network_rate(guest, plain, subnets))

    def _plain_kib(self, plain: LiveGuest) -> int:
        from offmap.audit.guest_ram import find_guest_ram
        from offmap.audit.process import Process

        with Process(plain.pid) as process:
            return own_kib(plain.pid, find_guest_ram(process).ranges)

    def _breaks(self, guest: LiveGuest) -> None:
        asker, ranges, key = self.asker, self.found.ranges, self.secrets.key
        asker.ask("breaks.process_vm_readv", lambda: reach.process_vm_readv(guest, ranges, key))
        asker.ask("breaks.ptrace", lambda: reach.ptrace(guest, ranges, key))
        asker.ask("breaks.gdb_attach", lambda: reach.gdb_attach(guest, ranges))
        asker.ask("breaks.hibernation", lambda: host_events.hibernation(self.found.hibernation_before))
        events: dict[str, Callable[[], str]] = {
            "breaks.drop_caches": host_events.drop_caches,
            "breaks.compaction": host_events.compaction,
            "breaks.memory_pressure": host_events.memory_pressure,
        }
        if self.job.native:
            asker.leave([*events, "breaks.kexec"], _SKIPPED_NATIVE)
            return
        guest.command(f"fill {host_events.PATTERN}")
        for id, act in events.items():
            asker.ask(id, lambda id=id, act=act: host_events.outlives(guest, id, act))  # type: ignore[misc]
        self._still_hidden(guest, list(events))
        asker.ask("breaks.kexec", lambda: host_events.kexec(self.job.guest_vmlinuz))

    def _still_hidden(self, guest: LiveGuest, events: Sequence[str]) -> None:
        """One walk after all of them: if it was hidden before, it must be so still."""
        first = self.found.first
        if first is None or first.audit.verdict is not Verdict.HIDDEN:
            return
        from offmap.audit.audit import audit_process

        try:
            verdict = audit_process(guest.pid, ranges=guest.ranges()).verdict
        except OffmapError as error:
            self.asker.say({"stage": f"not looked at again: {error}"})
            return
        if verdict is not Verdict.HIDDEN:
            for id in events:
                was = self.asker.answers[id]
                why = f"the guest is {verdict.value} after reclaim, compaction and pressure, and was hidden before"
                self.asker.tell(no(id, why, was.detail))

    # Afterwards

    def _seen_raw(self) -> int | None:
        """How many secrets show in frames that the kernel does not map: the control of the same look afterwards."""
        if self.spec.backend not in _NOT_LINUXS:
            return None
        try:
            return hidden.secrets_in_frames(hidden.guest_frames(self.found.first), self.secrets)
        except OSError:
            return None

    def _gone(self, plain: LiveGuest, before: int | None, seen_raw: int | None) -> None:
        asker, found = self.asker, self.found
        frames = hidden.guest_frames(found.first)
        asker.ask_many(
            hidden.GONE,
            lambda: hidden.after_the_end(
                plain, self.secrets, frames, found.memory_before, self.spec.backend not in _NOT_LINUXS
            ),
        )
        if self.spec.backend in _NOT_LINUXS:
            asker.ask("hidden.zeroed", lambda: hidden.zeroed_frames(frames, self.secrets, seen_raw))
        if before is not None:
            asker.tell(self._split_answer("costs.direct_map_left", before, "once the guest is gone"))

    def _without_guest(self) -> None:
        asker = self.asker
        asker.ask("costs.populate", lambda: costs.populate(self.backend_name))
        task = holder.Holder(self.backend_name, self._direct_file(), self.folder, may_dump=not self.job.native)
        asker.ask_many(holder.QUESTIONS, lambda: holder.hold(task))
        if self.spec.vcpus == 1:
            asker.stage("booting with 2 vCPUs")
            asker.ask("works.smp", self._smp)

    def _direct_file(self) -> Path | None:
        if self.job.native:
            return self.disks[0].path
        try:
            load_modules("brd")
        except OffmapError:
            return None
        device = Path("/dev/ram0")
        return device if device.exists() else None

    def _smp(self) -> Answer:
        setup = replace(self._setup(), words="", vcpus=2, disk=None, taps=[], vsock=None, balloon=None)
        with LiveGuest(setup, self.folder / "smp") as guest:
            guest.boot()
            guest.begin()
            answer = devices.smp(guest)
            guest.power_off()
        return answer

    def _provoke(self) -> None:
        """What offmap refuses, done all the same: the end of a host that cannot take it."""
        asker = self.asker
        asker.say({"question": "works.kvm_clock"})
        try:
            came = paravirtual.register_pvclock(self.backend_name, holder.SIZE)
        except OffmapError as error:
            asker.tell(undetermined("works.kvm_clock", f"not measured: {error}"))
            return
        asker.tell(no("works.kvm_clock", "offmap does not offer it here", f"without offmap's own refusal: {came}"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the cell that the only argument describes."""
    argv = sys.argv[1:] if arguments is None else arguments
    asker = Asker()
    asker.say({"host": host_facts().to_json()})
    job = Job.loads(argv[0])
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) and not job.native else str(job.folder)
    outcome, reason = "failed", ""
    try:
        with tempfile.TemporaryDirectory(prefix="offmap-measure-", dir=place) as folder:
            outcome, reason = _Cell(job, asker, Path(folder)).run()
    except BackendRefused as error:
        outcome, reason = "refused", str(error)
    except OffmapError as error:
        outcome, reason = "failed", str(error)
    asker.say({"outcome": outcome, "reason": reason})
    return 0


if __name__ == "__main__":
    sys.exit(main())
