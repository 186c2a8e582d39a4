"""A whole cell: all questions, asked on the cell's host.

There are three guests. A plain one runs all the time: the baseline of every ratio and the control of every scan. The
cell's own guest runs beside it. Once that has ended, a guest of two vCPUs runs on the same RAM. Questions that could
oops the host come last: an oops costs only the questions after it.
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec.structs import replace

from offmap.audit.audit import audit_process
from offmap.audit.guest_ram import RamRange, find_guest_ram
from offmap.audit.process import Process
from offmap.audit.verdict import Verdict
from offmap.compare.first_look import ATTACK
from offmap.compare.job import Line
from offmap.compare.kinds import Vmm
from offmap.compare.probes import attack, costs, devices, hidden, host_events, paravirtual, ram_process, reach
from offmap.compare.probes.guest_program import ProbeError
from offmap.compare.probes.host_kernel import direct_map
from offmap.compare.probes.live_guest import LiveGuest
from offmap.compare.probes.prepared_host import SKIPPED_NATIVE, TRIED_SIZE, PreparedHost
from offmap.compare.probes.survey import Survey, no, undetermined
from offmap.compare.probes.vmm_memory import own_kib
from offmap.compare.questions import Answer
from offmap.compare.vmm_command import GuestSetup
from offmap.errors import BackendRefused, OffmapError


class WholeCell:
    """One cell: the order of its questions.

    Args:
        host: made ready for it.
    """

    def __init__(self, host: PreparedHost, survey: Survey) -> None:
        self.host = host
        self.job = host.job
        self.spec = host.job.spec
        self.survey = survey
        self.direct_map_before = direct_map()
        self.first: hidden.Look | None = None
        self.last: hidden.Look | None = None
        self.ranges: Sequence[RamRange] = ()
        self.plain_exits: dict[str, int] = {}

    def run(self) -> None:
        """Ask everything.

        Raises:
            BackendRefused: the kind is refused.
            OffmapError: the cell failed.
        """
        survey = self.survey
        survey.say(Line(question="works.boot"))
        try:
            self.host.try_out()
            survey.stage("booting the plain guest")
            with LiveGuest(self.host.plain(), self.host.folder / "plain") as plain:
                plain.boot()
                # First, as idling exits too, and it idles while the other guest boots.
                self.plain_exits = costs.exit_counts(plain.pid)
                plain.begin()
                self._beside(plain)
        except BackendRefused:
            if self.host.withholds_clock and not self.job.native:
                self._provoke()
            raise
        survey.stage("the same RAM without a guest")
        self._without_guest()

    def _beside(self, plain: LiveGuest) -> None:
        survey = self.survey
        survey.stage("booting the guest")
        with LiveGuest(self.host.candidate(), self.host.folder / "guest") as guest:
            self._boot(guest, plain)
            survey.stage("looking at it after its boot")
            self._look(guest, plain, hidden.AFTER_BOOT)
            self._tell_split("costs.direct_map_split", "while the guest runs")
            survey.stage("attacking it")
            self._attack(guest, plain)
            for each in (guest, plain):
                with contextlib.suppress(ProbeError):  # a probe that needs a missing module says so
                    each.command("load virtio_pci virtio_mmio virtio_blk failover virtio_net vsock msr")
            survey.stage("trying its devices")
            self._devices(guest, plain)
            guest.check_alive()
            survey.stage("asking for KVM's features")
            self._features(guest)
            guest.check_alive()
            survey.stage("measuring what it costs")
            self._costs(guest, plain)
            guest.check_alive()
            survey.stage("looking at it after I/O")
            self._look(guest, plain, hidden.AFTER_IO)
            guest.check_alive()
            survey.stage("trying what may break")
            self._breaks(guest)
            guest.check_alive()
            survey.ask("works.balloon", lambda: self._balloon(guest))
            if not self.host.offers_clock and not self.job.native:
                survey.ask("works.kvm_clock", lambda: self._forbidden_clock(guest))  # may end the host
            seen_raw = self._secrets_in_frames()
            survey.stage("ending it")
            guest.end()
            survey.ask("costs.ram_ready", guest.ram_ready)
        survey.stage("looking at what it leaves")
        self._gone(plain, seen_raw)

    def _boot(self, guest: LiveGuest, plain: LiveGuest) -> None:
        """Boot it.

        Raises:
            BackendRefused: the VMM refused the RAM.
            OffmapError: it did not boot. The answer is then "no".
        """
        survey = self.survey
        survey.say(Line(question="works.boot"))
        try:
            guest.boot()
            counts = costs.exit_counts(guest.pid)
            guest.begin()
        except BackendRefused:
            raise
        except OffmapError as error:
            survey.tell(no("works.boot", str(error)))
            raise
        survey.say(Line(guest=guest.facts))
        survey.tell(*guest.booted())
        survey.tell(costs.exits([counts], [self.plain_exits], plain.setup.kind.name))
        survey.tell(costs.boots([guest.boot_seconds], [plain.boot_seconds], "with its devices and secrets"))

    def _look(self, guest: LiveGuest, plain: LiveGuest, ids: Sequence[str]) -> None:
        def probe() -> list[Answer]:
            look = hidden.look_beside(guest, plain, self.host.secrets)
            self.first, self.last = self.first or look, look
            self.ranges = look.snapshot.ram.ranges
            if ids is hidden.AFTER_IO:
                return hidden.answers_after_io(look)
            return hidden.answers_after_boot(look)

        self.survey.ask_many(ids, probe)

    def _attack(self, guest: LiveGuest, plain: LiveGuest) -> None:
        if self.job.not_known:
            self.survey.leave(ATTACK, self.job.not_known)
        else:
            self.survey.ask_many(ATTACK, lambda: attack.attacked(self.job, guest, plain))

    def _tell_split(self, id: str, when: str) -> None:
        self.survey.tell(costs.split(id, self.direct_map_before, direct_map(), when))

    def _devices(self, guest: LiveGuest, plain: LiveGuest) -> None:
        survey, host = self.survey, self.host
        survey.ask("works.virtio_blk", lambda: devices.virtio_blk(guest, host.disks[0]))
        for number, id in enumerate(("works.virtio_net", "works.vhost_net")):
            if id == "works.vhost_net" and host.kind.vmm is Vmm.FIRECRACKER:
                survey.tell(no(id, "Firecracker has no vhost"))
                continue
            survey.ask(id, lambda n=number, id=id: devices.virtio_net(guest, n, host.subnets()[n], id))  # type: ignore[misc]
        survey.ask("works.vsock", lambda: devices.vsock(guest))
        with contextlib.suppress(OffmapError, OSError):  # both guests must have done the same before they are compared
            devices.virtio_blk(plain, host.disks[1])
            devices.vsock(plain)
            for number, subnet in enumerate(host.subnets()[2 : 2 + len(plain.setup.cards)]):
                devices.virtio_net(plain, number, subnet, "works.virtio_net")

    def _balloon(self, guest: LiveGuest) -> Answer:
        id = "works.balloon"
        if self.host.cannot_discard:
            return no(id, self.host.cannot_discard)
        if guest.setup.balloon is None:
            return undetermined(id, "not measured: this VMM's balloon was not tried")
        return devices.balloon(guest, self.ranges)

    def _features(self, guest: LiveGuest) -> None:
        survey = self.survey
        why = "" if self.host.offers_clock else "not offered: KVM writes its page by a kernel mapping"
        survey.ask("works.kvm_clock", lambda: paravirtual.kvm_clock(guest, why))
        survey.ask("works.steal_time", lambda: paravirtual.steal_time(guest))
        for id in ("works.async_pf", "works.pv_eoi"):
            survey.ask(id, lambda id=id: paravirtual.feature(guest, id))  # type: ignore[misc]
        if guest.setup.vcpus > 1:
            survey.ask("works.smp", lambda: devices.smp(guest))

    def _forbidden_clock(self, guest: LiveGuest) -> Answer:
        answer = paravirtual.forbidden_clock(guest, self.survey.answers["works.kvm_clock"])
        pages = audit_process(guest.pid, ranges=guest.ranges()).pages
        detail = f"{answer.detail}; {pages.mapped_pages} pages of guest RAM are mapped by the host kernel then"
        return Answer(answer.question, answer.value, answer.reason, detail=detail)

    def _costs(self, guest: LiveGuest, plain: LiveGuest) -> None:
        survey = self.survey

        def memory() -> Answer:
            with Process(plain.pid) as process:
                ranges = plain.ranges() or find_guest_ram(process).ranges
            return costs.vmm_memory(own_kib(guest.pid, self.ranges), own_kib(plain.pid, ranges))

        survey.ask("costs.vmm_memory", memory)
        for id in costs.RATES:
            survey.ask(id, lambda id=id: costs.rates(id, guest, plain))  # type: ignore[misc]

        survey.ask("costs.net", lambda: costs.network_rate(guest, plain, self.host.subnets()[::2]))

    def _breaks(self, guest: LiveGuest) -> None:
        survey, ranges, key = self.survey, self.ranges, self.host.secrets.key
        survey.ask("breaks.process_vm_readv", lambda: reach.process_vm_readv(guest, ranges, key))
        survey.ask("breaks.ptrace", lambda: reach.ptrace(guest, ranges, key))
        survey.ask("breaks.gdb_attach", lambda: reach.gdb_attach(guest, ranges))
        guest.check_alive()
        survey.ask("breaks.hibernation", lambda: host_events.hibernation(self.host.hibernation))
        events: dict[str, Callable[[], str]] = {
            "breaks.drop_caches": host_events.drop_caches,
            "breaks.compaction": host_events.compaction,
            "breaks.memory_pressure": host_events.memory_pressure,
        }
        if self.job.native:
            survey.leave([*events, "breaks.kexec"], SKIPPED_NATIVE)
            return
        guest.command(f"fill {host_events.PATTERN}")
        for id, act in events.items():
            survey.ask(id, lambda id=id, act=act: host_events.outlives(guest, id, act))  # type: ignore[misc]
        self._still_hidden(guest, list(events))
        survey.ask("breaks.kexec", lambda: host_events.kexec(Path(self.job.guest_vmlinuz)))

    def _still_hidden(self, guest: LiveGuest, events: Sequence[str]) -> None:
        """Audit once after all events: a guest that was hidden must still be hidden."""
        if self.first is None or self.first.audit.verdict is not Verdict.HIDDEN:
            return
        try:
            verdict = audit_process(guest.pid, ranges=guest.ranges()).verdict
            why = f"the guest is {verdict.value} after reclaim, compaction and pressure, and was hidden before"
        except OffmapError as error:
            verdict, why = Verdict.UNKNOWN, f"whether the guest is still as hidden cannot be said: {error}"
        if verdict is not Verdict.HIDDEN:
            judge = no if verdict is Verdict.EXPOSED else undetermined
            self.survey.tell(*(judge(id, why, self.survey.answers[id].detail) for id in events))

    # Afterwards

    def _secrets_in_frames(self) -> int | None:
        """How many secrets show in frames that the kernel does not map: the control of the same look afterwards."""
        if self.host.backend.linux_owned:
            return None
        try:
            return hidden.secrets_in_frames(hidden.guest_frames(self.last), self.host.secrets)
        except OSError:
            return None

    def _gone(self, plain: LiveGuest, seen_raw: int | None) -> None:
        survey, secrets = self.survey, self.host.secrets
        frames = hidden.guest_frames(self.last)
        linuxs = self.host.backend.linux_owned
        survey.ask_many(hidden.GONE, lambda: hidden.after_the_end(plain, secrets, frames, self.host.memory_kib, linuxs))
        if not linuxs:
            survey.ask("hidden.zeroed", lambda: hidden.zeroed_frames(frames, secrets, seen_raw))
        self._tell_split("costs.direct_map_left", "once the guest is gone")

    def _without_guest(self) -> None:
        survey, host = self.survey, self.host
        survey.ask("costs.populate", lambda: costs.populate(host.backend))
        task = ram_process.RamTask(host.backend, host.direct_file(), host.folder, may_dump=not self.job.native)
        survey.ask_many(ram_process.QUESTIONS, lambda: ram_process.hold_ram(task))
        if host.kind.vmm is not Vmm.OFFMAP:
            for id in ("costs.populate", *ram_process.QUESTIONS):
                known = survey.answers[id]
                survey.tell(replace(known, detail=f"by a process of offmap's; {known.detail}"))
        if self.spec.vcpus == 1:
            survey.stage("booting with 2 vCPUs")
            survey.ask("works.smp", self._smp)
        if self.job.boots > 1:
            survey.stage(f"booting {self.job.boots} pairs of guests")
            survey.ask_many(("costs.boot", "costs.exits"), self._boots, or_as_known=True)

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
            costs.exits([counts for _, counts in mine], [counts for _, counts in plain], setups[1].kind.name),
        ]

    def _smp(self) -> Answer:
        with LiveGuest(self.host.bare(self.host.candidate(), 2), self.host.folder / "smp") as guest:
            guest.boot()
            guest.begin()
            answer = devices.smp(guest)
            guest.end()
        return answer

    def _provoke(self) -> None:
        """What offmap refuses, done all the same: the end of a host that cannot take it."""
        survey = self.survey
        survey.say(Line(question="works.kvm_clock"))
        try:
            came = paravirtual.register_pvclock(self.host.backend, TRIED_SIZE)
        except OffmapError as error:
            survey.tell(undetermined("works.kvm_clock", f"not measured: {error}"))
            return
        survey.tell(no("works.kvm_clock", "offmap does not offer it here", f"without offmap's own refusal: {came}"))
