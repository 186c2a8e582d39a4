"""Whether time passes in a guest: a question made up for a test."""

from offmap.compare.probes.live_guest import LiveGuest
from offmap.compare.probes.survey import no, yes
from offmap.compare.questions import Answer

__all__ = ["goes_forward"]


def goes_forward(guest: LiveGuest) -> Answer:
    """Read the guest's uptime twice."""
    first, second = (float(guest.shell("cat /proc/uptime").split()[0]) for _ in range(2))
    detail = f"{first} s, then {second} s"
    return yes("works.uptime", detail) if second > first else no("works.uptime", "it stands still", detail)
