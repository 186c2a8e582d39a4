"""What `signal` has, from the module that it is made of. Its enumerations take longer to make than all of this."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from signal import (
        SIG_BLOCK,
        SIG_DFL,
        SIG_IGN,
        SIGCHLD,
        SIGHUP,
        SIGINT,
        SIGKILL,
        SIGPIPE,
        SIGQUIT,
        SIGTERM,
        SIGTRAP,
        SIGXFSZ,
        pidfd_send_signal,
        pthread_sigmask,
        signal,
        sigtimedwait,
    )
else:
    from _signal import *  # noqa: F403

__all__ = [
    "SIGCHLD",
    "SIGHUP",
    "SIGINT",
    "SIGKILL",
    "SIGPIPE",
    "SIGQUIT",
    "SIGTERM",
    "SIGTRAP",
    "SIGXFSZ",
    "SIG_BLOCK",
    "SIG_DFL",
    "SIG_IGN",
    "pidfd_send_signal",
    "pthread_sigmask",
    "signal",
    "sigtimedwait",
]
