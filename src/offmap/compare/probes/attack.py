"""What an attacker gets who can read what the host kernel maps: `offmap attack` on the guest, and on a plain one."""

from pathlib import Path

from offmap.attack.attack import Beforehand, Victim, attack
from offmap.attack.kcore_primitive import KcorePrimitive
from offmap.attack.knowledge import known
from offmap.attack.result import AttackResult, Outcome
from offmap.attack.target import PlantedSecret
from offmap.attack.text import render_text
from offmap.compare.guest import SECRET_PROCESS
from offmap.compare.job import Job
from offmap.compare.probes.guest_program import ProbeError
from offmap.compare.probes.live_guest import LiveGuest
from offmap.compare.questions import Answer


def attacked(job: Job, guest: LiveGuest, control: LiveGuest) -> list[Answer]:
    """offmap.compare.first_look.ATTACK, by one attack on each of the two guests.

    Raises:
        OffmapError: a guest has no secret, or this host does not let itself be read.
    """
    beforehand = Beforehand(known(Path(job.host_known)), known(Path(job.guest_known)))
    with KcorePrimitive() as primitive:
        return answers_of(attack(primitive, beforehand, _victim(guest), _victim(control)))


def _victim(guest: LiveGuest) -> Victim:
    if not guest.secret:
        raise ProbeError("a guest did not say that it has a secret")
    return Victim(guest.pid, PlantedSecret(SECRET_PROCESS, guest.secret))


def answers_of(result: AttackResult) -> list[Answer]:
    """The result as answers. What was reached or lost is not determined: it is no end, and the secret was not read."""
    attempt, outcome = result.attempt, Outcome(result.outcome)
    reads, detail = f"{attempt.reads:,} reads", render_text(result)
    match outcome:
        case Outcome.RECOVERED:
            first = Answer("hidden.attack", False, f"recovered in {reads}", detail=detail)
        case Outcome.ENDS:
            first = Answer("hidden.attack", True, f'ends at "{attempt.stage}": {attempt.reason}', detail=detail)
        case Outcome.REACHED | Outcome.UNKNOWN:
            first = Answer("hidden.attack", None, f"{outcome.value}: {result.reason}", detail=detail)
    if first.value is None or result.control is None or result.control.outcome != Outcome.RECOVERED:
        second = Answer("hidden.attack_reads", None, first.reason if first.value is None else "the control is lost")
    else:
        pair = (float(attempt.reads),), (float(result.control.reads),)
        second = Answer("hidden.attack_reads", attempt.reads, "", *pair)
    return [first, second]
