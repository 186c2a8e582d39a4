"""The short cell: one guest, alone on its host. Does it boot, and what of its RAM can the host kernel reach?"""

from pathlib import Path

from offmap.audit.audit import Stage
from offmap.compare.job import Job, Line
from offmap.compare.kinds import kind_of
from offmap.compare.probes.hidden import AFTER_BOOT, Secrets, answers_after_boot, look_alone
from offmap.compare.probes.live_guest import LiveGuest
from offmap.compare.probes.survey import Survey, measured
from offmap.compare.vmm_command import GuestSetup

QUESTIONS = ("works.boot", "hidden.canaries_planted", "costs.boot", *AFTER_BOOT, "costs.ram_ready")


def first_look(job: Job, folder: Path, survey: Survey) -> None:
    """Boot the guest, look at it, end it.

    Raises:
        BackendRefused: the VMM refused the RAM.
        OffmapError: the guest did not boot, or its VMM ended badly.
    """
    secrets = Secrets(job.preset.canaries)
    setup = GuestSetup(
        kind_of(job.spec.backend),
        Path(job.guest_vmlinuz),
        Path(job.initrd),
        # So that the clock it uses tells whether it has kvm-clock: a guest with both may prefer the TSC.
        words=f"clocksource=kvm-clock {secrets.of_candidate}",
        vcpus=job.spec.vcpus,
        kvm_clock=job.spec.kvm_clock,
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
        survey.stage("ending")
        guest.end()
        survey.ask("costs.ram_ready", guest.ram_ready)
