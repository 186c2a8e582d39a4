"""The exit status of every offmap command. (`errors` has it too, and imports it for who asks: `enum` takes long.)"""

from enum import IntEnum


class ExitStatus(IntEnum):
    """Exit status of every offmap command (docs/index.md)."""

    DONE = 0  # for an audit: hidden
    EXPOSED = 1
    FAILED = 2  # it failed or was used wrongly
    UNDETERMINED = 3  # the answer cannot be determined here
    NOT_RUN = 125  # of run --exec, whose others are the command's (as env(1), timeout(1) and others have it)
