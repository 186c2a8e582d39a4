"""The short cell: one guest. Does it boot, and what of its RAM can the host kernel reach? What does an attacker get?"""

from dataclasses import replace
from pathlib import Path

from offmap.audit.audit import Stage
from offmap.compare.guest import PLANT_SECRET
from offmap.compare.job import Job, Line
from offmap.compare.kinds import kind_of
from offmap.compare.probes.hidden import AFTER_BOOT, Secrets, answers_after_boot, look_alone
from offmap.compare.probes.live_guest import LiveGuest
from offmap.compare.probes.survey import Survey, measured
from offmap.compare.questions import Answer
from offmap.compare.vmm_command import GuestSetup

CONTROL = kind_of("anon")
"""Plain RAM, for the guest that the same attack must get through."""

QUESTIONS = ("works.boot", "hidden.canaries_planted", "costs.boot", *AFTER_BOOT, "costs.ram_ready")
ATTACK = ("hidden.attack", "hidden.attack_reads")

# The clock it uses is to tell whether it has kvm-clock: a guest with both may prefer the TSC.
_WORDS = "clocksource=kvm-clock"


def first_look(job: Job, folder: Path, survey: Survey) -> None:
    """Boot the guest, look at it, attack it if the job has what that needs, end it.

    Raises:
        BackendRefused: the VMM refused the RAM.
        OffmapError: the guest did not boot, or its VMM ended badly.
    """
    secrets = Secrets(job.preset.canaries)
    setup = GuestSetup(
        kind_of(job.spec.backend),
        Path(job.guest_vmlinux or job.guest_vmlinuz),
        Path(job.initrd),
        words=f"{_WORDS} {secrets.of_candidate}" + (f" {PLANT_SECRET}" if job.host_known else ""),
        vcpus=job.spec.vcpus,
        kvm_clock=job.spec.kvm_clock,
        firecracker=Path(job.firecracker),
        vmlinux=Path(job.guest_vmlinux),
    )

    def progress(stage: Stage, share: float) -> None:
        survey.say(Line(stage=stage.value, share=round(share, 3)))

    survey.stage("booting the guest")
    survey.say(Line(question="works.boot"))
    with LiveGuest(setup, folder) as guest:
        guest.boot()
        survey.say(Line(guest=guest.facts))
        survey.tell(*guest.booted())
        survey.tell(measured("costs.boot", round(guest.boot_seconds, 3), "one boot, which gives no spread"))
        survey.ask_many(AFTER_BOOT, lambda: answers_after_boot(look_alone(guest, secrets, progress)))
        if job.host_known:
            _attack(job, guest, folder, survey)
        survey.stage("ending")
        guest.end()
        survey.ask("costs.ram_ready", guest.ram_ready)


def _attack(job: Job, guest: LiveGuest, folder: Path, survey: Survey) -> None:
    from offmap.compare.probes import attack  # here: an emulated host takes a second to import it

    def probe() -> list[Answer]:
        survey.stage("booting a plain guest beside it")
        with LiveGuest(
            replace(guest.setup, kind=CONTROL, words=f"{_WORDS} {PLANT_SECRET}"), folder / "plain"
        ) as control:
            control.boot()
            survey.stage("attacking both")
            return attack.attacked(job, guest, control)

    survey.ask_many(ATTACK, probe)
