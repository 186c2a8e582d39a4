"""What the user of a wrapper allows."""

TYPE_CHECKING = False  # the start does not wait for `enum`
if TYPE_CHECKING:
    from offmap.exit_status import ExitStatus


class Policy:
    """How strict the supervisor is.

    Attributes:
        kill: a VMM whose guest is exposed is ended; else that is only said.
        kill_undetermined: so is one that no audit could judge.
        trust_shared: no process but the VMM uses its shared files.
        keep_clock: the guest may have kvm-clock, and nothing ends the VMM for the one page that this exposes.
    """

    def __init__(
        self,
        *,
        kill: bool = True,
        kill_undetermined: bool = False,
        trust_shared: bool = False,
        keep_clock: bool = False,
    ) -> None:
        self.kill = kill
        self.kill_undetermined = kill_undetermined
        self.trust_shared = trust_shared
        self.keep_clock = keep_clock

    def ends(self, status: "ExitStatus | None", *, clock_alone: bool = False) -> str:
        """The option by which a VMM with this verdict, or none, is ended; empty: it goes on.

        Args:
            clock_alone: of a guest that is exposed, nothing is but kvm-clock's page.
        """
        from offmap.exit_status import ExitStatus

        if status == ExitStatus.EXPOSED and self.kill and not (clock_alone and self.keep_clock):
            return "--on-exposed"
        return "--on-undetermined" if status == ExitStatus.UNDETERMINED and self.kill_undetermined else ""
