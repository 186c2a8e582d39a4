"""An attack and its control, as one result."""

from collections.abc import Sequence
from dataclasses import dataclass

from offmap import __version__
from offmap.attack.chain import Chain
from offmap.attack.knowledge import Kernel
from offmap.attack.primitive import Primitive
from offmap.attack.rates import times_at_rates
from offmap.attack.result import AttackResult, Attempt, Outcome
from offmap.attack.sweep import Pieces
from offmap.attack.target import Target
from offmap.attack.text import headline
from offmap.audit.host import host_facts, utc_now


@dataclass(frozen=True)
class Victim:
    """A VM that is attacked.

    Attributes:
        pid: of its VMM.
        target: what is wanted of its guest.
        pieces: the same, to sweep all that is mapped for it; None: no sweep.
    """

    pid: int
    target: Target
    pieces: Pieces | None = None


@dataclass(frozen=True)
class Beforehand:
    """What the attacker knows.

    Attributes:
        host, guest: builds of the kernels.
        base: where the host's image is; None if that must be found.
    """

    host: Kernel
    guest: Kernel
    base: int | None = None

    def words(self) -> Sequence[str]:
        base = "its place in memory" if self.base is not None else "not its place in memory"
        return (
            f"known of the host: the build {_version(self.host)}, {base}",
            f"known of the guest: the build {_version(self.guest)}, not its place in memory",
            "known of the victim: its VMM's PID and the name of the process",
        )


def attack(primitive: Primitive, known: Beforehand, victim: Victim, control: Victim | None) -> AttackResult:
    """Attack a VM, and the control before it."""

    def attempt(on: Victim, plain: bool) -> Attempt:
        chain = Chain(primitive, known.host, known.guest, on.pid, on.target, known.base, plain, on.pieces)
        return chain.run()

    beside = None if control is None else attempt(control, plain=True)
    found = attempt(victim, plain=False)
    outcome, reason = Outcome(found.outcome), f"{headline(found)}: {found.reason}"
    if outcome is Outcome.ENDS and not primitive.exact:
        outcome, reason = Outcome.UNKNOWN, f"{reason}; but a primitive that errs cannot tell that (--error-rate)"
    elif outcome is Outcome.ENDS:
        # What stops here may only be what is wrong with the chain.
        if beside is None:
            outcome = Outcome.UNKNOWN
            reason = f"{reason}; without a control that gets through, that says nothing (--control)"
        elif beside.outcome != Outcome.RECOVERED:
            outcome = Outcome.UNKNOWN
            reason = f"the control does not get through, so nothing follows: {headline(beside)}: {beside.reason}"
        else:
            reason = f"{reason}; the control beside it was recovered in {beside.reads:,} reads"
            if found.sweep is None:
                reason += "; what else the kernel maps was not searched (--pieces)"
    return AttackResult(
        offmap=__version__,
        time=utc_now(),
        host=host_facts(),
        primitive=primitive.name,
        knowledge=(*known.words(), *_beside(primitive)),
        outcome=outcome,
        reason=reason,
        attempt=found,
        control=beside,
        times=times_at_rates(found.bytes) if outcome is Outcome.RECOVERED else (),
    )


def _beside(primitive: Primitive) -> Sequence[str]:
    return ("the primitive reads the VMM's user memory too",) if primitive.user_memory else ()


def _version(kernel: Kernel) -> str:
    return kernel.banner.split()[2] if len(kernel.banner.split()) > 2 else kernel.banner
