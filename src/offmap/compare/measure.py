"""Measure one cell, on the host that it is about: ``python -m offmap.compare.measure JOB`` (offmap.compare.job).

Three guests: a plain one that stays all the time, baseline of every ratio and control of every scan; the one that the
cell is about, beside it; and, once that has ended, one of two vCPUs on the same RAM. What could end the host comes
last, as an oops costs only what follows.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from offmap.audit.audit import audit_process
from offmap.audit.guest_ram import RamRange, find_guest_ram
from offmap.audit.host import host_facts
from offmap.audit.process import Process
from offmap.audit.verdict import Verdict
from offmap.compare.job import Job
from offmap.compare.matrix import kind_of
from offmap.compare.probes import costs, devices, hidden, holder, host_events, paravirtual, reach
from offmap.compare.probes.asker import Asker, no, undetermined, yes
from offmap.compare.probes.guest_program import ProbeError
from offmap.compare.probes.host_kernel import direct_map
from offmap.compare.probes.live_guest import MEMORY_SIZE, GuestSetup, LiveGuest
from offmap.compare.probes.prepared_host import SKIPPED_NATIVE, TRIED_SIZE, PreparedHost
from offmap.compare.probes.vmm_memory import own_kib
from offmap.compare.questions import Answer
from offmap.compare.vm_process import QEMU
from offmap.errors import BackendRefused, ExitStatus, OffmapError

__all__ = ["main"]


class _Cell:
    """One cell: the order of its questions.

    Args:
        host: made ready for it.
    """

    def __init__(self, host: PreparedHost, asker: Asker) -> None:
        self.host = host
        self.job = host.job
        self.spec = host.job.spec
        self.asker = asker
        self.direct_map_before = direct_map()
        self.first: hidden.Sighting | None = None
        self.last: hidden.Sighting | None = None
        self.ranges: Sequence[RamRange] = ()
        self.plain_exits: dict[str, int] = {}

    def run(self) -> tuple[str, str]:
        """Ask everything; returns the outcome and its reason."""
        asker = self.asker
        asker.say({"question": "works.boot"})
        try:
            self.host.try_out()
            asker.stage("booting the plain guest")
            with LiveGuest(self.host.plain(), self.host.folder / "plain") as plain:
                plain.boot()
                # Before anything else is done with it: it idles, and exits for that, while the other one boots.
                self.plain_exits = costs.exit_counts(plain.pid)
                plain.begin()
                self._beside(plain)
        except BackendRefused as error:
            if self.host.withholds_clock and not self.job.native:
                self._provoke()
            return "refused", str(error)
        asker.stage("the same RAM without a guest")
        self._without_guest()
        return "booted", ""

    def _beside(self, plain: LiveGuest) -> None:
        asker = self.asker
        asker.stage("booting the guest")
        with LiveGuest(self.host.candidate(), self.host.folder / "guest") as guest:
            console = self._boot(guest, plain)
            asker.stage("looking at it after its boot")
            self._look(guest, plain, hidden.AFTER_BOOT)
            self._tell_split("costs.direct_map_split", "while the guest runs")
            for each in (guest, plain):
                with contextlib.suppress(ProbeError):  # whoever needs what is missing will say so
                    each.command("load virtio_mmio virtio_blk failover virtio_net vsock msr")
            asker.stage("trying its devices")
            self._devices(guest, plain)
            guest.check_alive()
            asker.stage("asking for KVM's features")
            self._features(guest, console)
            guest.check_alive()
            asker.stage("measuring what it costs")
            self._costs(guest, plain)
            guest.check_alive()
            asker.stage("looking at it after I/O")
            self._look(guest, plain, hidden.AFTER_IO)
            guest.check_alive()
            asker.stage("trying what may break")
            self._breaks(guest)
            guest.check_alive()
            asker.ask("works.balloon", lambda: self._balloon(guest))
            if not self.host.offers_clock and not self.job.native:
                asker.ask("works.kvm_clock", lambda: self._forbidden_clock(guest))  # may end the host
            seen_raw = self._secrets_in_frames()
            asker.stage("ending it")
            status = guest.power_off()
            if status != ExitStatus.DONE:
                raise OffmapError(f"the VMM ended with status {status}: {guest.complaint()}")
        asker.stage("looking at what it leaves")
        self._gone(plain, seen_raw)

    def _boot(self, guest: LiveGuest, plain: LiveGuest) -> str:
        """Boot it; returns what its console said.

        Raises:
            BackendRefused: the VMM refused the RAM.
            OffmapError: it did not get so far, which is an answer too.
        """
        asker = self.asker
        asker.say({"question": "works.boot"})
        try:
            console = guest.boot()
            counts = costs.exit_counts(guest.pid)
            guest.begin()
        except BackendRefused:
            raise
        except OffmapError as error:
            asker.tell(no("works.boot", str(error)))
            raise
        asker.tell(yes("works.boot", f"Linux {guest.release}, {MEMORY_SIZE >> 20} MiB, init ready"))
        asker.tell(costs.exits([counts], [self.plain_exits], plain.setup.backend))
        asker.tell(costs.boots([guest.boot_seconds], [plain.boot_seconds], "with its devices and secrets"))
        return console

    def _look(self, guest: LiveGuest, plain: LiveGuest, ids: Sequence[str]) -> None:
        after_io = ids is hidden.AFTER_IO

        def probe() -> list[Answer]:
            sighting = hidden.look(guest, plain, self.host.secrets)
            self.first, self.last = self.first or sighting, sighting
            self.ranges = sighting.audit.ram.ranges
            answers = hidden.sightings(sighting, after_io=after_io)
            if not after_io:
                answers.append(Answer("hidden.canaries_planted", hidden.CANARIES))
            return answers

        self.asker.ask_many(ids, probe)

    def _tell_split(self, id: str, when: str) -> None:
        self.asker.tell(costs.split(id, self.direct_map_before, direct_map(), when))

    def _devices(self, guest: LiveGuest, plain: LiveGuest) -> None:
        asker, host = self.asker, self.host
        asker.ask("works.virtio_blk", lambda: devices.virtio_blk(guest, host.disks[0]))
        for number, id in enumerate(("works.virtio_net", "works.vhost_net")):
            asker.ask(id, lambda n=number, id=id: devices.virtio_net(guest, n, host.subnets()[n], id))  # type: ignore[misc]
        asker.ask("works.vsock", lambda: devices.vsock(guest))
        with contextlib.suppress(OffmapError, OSError):  # so that both have done the same when they are compared
            devices.virtio_blk(plain, host.disks[1])
            devices.vsock(plain)
            for number, subnet in enumerate(host.subnets()[2:]):
                devices.virtio_net(plain, number, subnet, "works.virtio_net")

    def _balloon(self, guest: LiveGuest) -> Answer:
        id = "works.balloon"
        if self.host.cannot_discard:
            return no(id, self.host.cannot_discard)
        if guest.setup.balloon is None:
            return undetermined(id, "not measured: QEMU's balloon was not tried")
        return devices.balloon(guest, self.ranges)

    def _features(self, guest: LiveGuest, console: str) -> None:
        asker = self.asker
        why = "" if self.host.offers_clock else "not offered: KVM writes its page by a kernel mapping"
        asker.ask("works.kvm_clock", lambda: paravirtual.kvm_clock(guest, console, why))
        asker.ask("works.steal_time", lambda: paravirtual.steal_time(guest))
        for id in ("works.async_pf", "works.pv_eoi"):
            asker.ask(id, lambda id=id: paravirtual.feature(guest, id))  # type: ignore[misc]
        if guest.setup.vcpus > 1:
            asker.ask("works.smp", lambda: devices.smp(guest))

    def _forbidden_clock(self, guest: LiveGuest) -> Answer:
        answer = paravirtual.forbidden_clock(guest, self.asker.answers["works.kvm_clock"])
        pages = audit_process(guest.pid, ranges=guest.ranges()).pages
        detail = f"{answer.detail}; {pages.mapped_pages} pages of guest RAM are mapped by the host kernel then"
        return Answer(answer.question, answer.value, answer.reason, detail=detail)

    def _costs(self, guest: LiveGuest, plain: LiveGuest) -> None:
        asker = self.asker

        def memory() -> Answer:
            with Process(plain.pid) as process:
                ranges = plain.ranges() or find_guest_ram(process).ranges
            return costs.vmm_memory(own_kib(guest.pid, self.ranges), own_kib(plain.pid, ranges))

        asker.ask("costs.vmm_memory", memory)
        for id in costs.RATES:
            asker.ask(id, lambda id=id: costs.rates(id, guest, plain))  # type: ignore[misc]

        asker.ask("costs.net", lambda: costs.network_rate(guest, plain, self.host.subnets()[::2]))

    def _breaks(self, guest: LiveGuest) -> None:
        asker, ranges, key = self.asker, self.ranges, self.host.secrets.key
        asker.ask("breaks.process_vm_readv", lambda: reach.process_vm_readv(guest, ranges, key))
        asker.ask("breaks.ptrace", lambda: reach.ptrace(guest, ranges, key))
        asker.ask("breaks.gdb_attach", lambda: reach.gdb_attach(guest, ranges))
        guest.check_alive()
        asker.ask("breaks.hibernation", lambda: host_events.hibernation(self.host.hibernation))
        events: dict[str, Callable[[], str]] = {
            "breaks.drop_caches": host_events.drop_caches,
            "breaks.compaction": host_events.compaction,
            "breaks.memory_pressure": host_events.memory_pressure,
        }
        if self.job.native:
            asker.leave([*events, "breaks.kexec"], SKIPPED_NATIVE)
            return
        guest.command(f"fill {host_events.PATTERN}")
        for id, act in events.items():
            asker.ask(id, lambda id=id, act=act: host_events.outlives(guest, id, act))  # type: ignore[misc]
        self._still_hidden(guest, list(events))
        asker.ask("breaks.kexec", lambda: host_events.kexec(self.job.guest_vmlinuz))

    def _still_hidden(self, guest: LiveGuest, events: Sequence[str]) -> None:
        """One walk after all of them: what was hidden before must be so still."""
        if self.first is None or self.first.audit.verdict is not Verdict.HIDDEN:
            return
        try:
            verdict = audit_process(guest.pid, ranges=guest.ranges()).verdict
            why = f"the guest is {verdict.value} after reclaim, compaction and pressure, and was hidden before"
        except OffmapError as error:
            verdict, why = Verdict.UNKNOWN, f"whether the guest is still as hidden cannot be said: {error}"
        if verdict is not Verdict.HIDDEN:
            judge = no if verdict is Verdict.EXPOSED else undetermined
            self.asker.tell(*(judge(id, why, self.asker.answers[id].detail) for id in events))

    # Afterwards

    def _secrets_in_frames(self) -> int | None:
        """How many secrets show in frames that the kernel does not map: the control of the same look afterwards."""
        if kind_of(self.spec.backend).linux_owned:
            return None
        try:
            return hidden.secrets_in_frames(hidden.guest_frames(self.last), self.host.secrets)
        except OSError:
            return None

    def _gone(self, plain: LiveGuest, seen_raw: int | None) -> None:
        asker, secrets = self.asker, self.host.secrets
        frames = hidden.guest_frames(self.last)
        linuxs = kind_of(self.spec.backend).linux_owned
        asker.ask_many(hidden.GONE, lambda: hidden.after_the_end(plain, secrets, frames, self.host.memory_kib, linuxs))
        if not linuxs:
            asker.ask("hidden.zeroed", lambda: hidden.zeroed_frames(frames, secrets, seen_raw))
        self._tell_split("costs.direct_map_left", "once the guest is gone")

    def _without_guest(self) -> None:
        asker, host = self.asker, self.host
        asker.ask("costs.populate", lambda: costs.populate(host.backend.name))
        task = holder.Holder(host.backend.name, host.direct_file(), host.folder, may_dump=not self.job.native)
        asker.ask_many(holder.QUESTIONS, lambda: holder.hold(task))
        if self.spec.backend == QEMU:
            for id in ("costs.populate", *holder.QUESTIONS):
                known = asker.answers[id]
                asker.tell(replace(known, detail=f"by a process of offmap's that maps /dev/offmap; {known.detail}"))
        if self.spec.vcpus == 1:
            asker.stage("booting with 2 vCPUs")
            asker.ask("works.smp", self._smp)
        if self.job.boots > 1:
            asker.stage(f"booting {self.job.boots} pairs of guests")
            asker.ask_many(("costs.boot", "costs.exits"), self._boots, or_as_known=True)

    def _boots(self) -> list[Answer]:
        """Boot both kinds by turns, without devices and secrets."""

        def boot(setup: GuestSetup) -> tuple[float, dict[str, int]]:
            with LiveGuest(self.host.bare(setup, self.spec.vcpus), self.host.folder / "boot") as guest:
                guest.boot()
                return guest.boot_seconds, costs.exit_counts(guest.pid)

        setups = self.host.candidate(), self.host.plain()
        mine, plain = costs.by_turns(self.job.boots, lambda: boot(setups[0]), lambda: boot(setups[1]), warm_up=False)
        return [
            costs.boots([seconds for seconds, _ in mine], [seconds for seconds, _ in plain], "without devices"),
            costs.exits([counts for _, counts in mine], [counts for _, counts in plain], setups[1].backend),
        ]

    def _smp(self) -> Answer:
        with LiveGuest(self.host.bare(self.host.candidate(), 2), self.host.folder / "smp") as guest:
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
            came = paravirtual.register_pvclock(self.host.backend.name, TRIED_SIZE)
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
    try:
        asker.stage("preparing the host")
        with (
            tempfile.TemporaryDirectory(prefix="offmap-measure-", dir=place) as folder,
            PreparedHost(job, Path(folder)) as host,
        ):
            outcome, reason = _Cell(host, asker).run()
    except BackendRefused as error:
        outcome, reason = "refused", str(error)
    except OffmapError as error:
        outcome, reason = "failed", str(error)
    asker.say({"outcome": outcome, "reason": reason})
    return 0


if __name__ == "__main__":
    sys.exit(main())
