"""The signal that takes a vCPU's thread out of KVM_RUN. Any thread may prepare it, and send it.

Python's own handlers can be installed by the main thread only, and run there. This one is a function of the C library
that does nothing, so that the signal interrupts KVM_RUN, which always answers EINTR, and nothing else.
KVM_SET_SIGNAL_MASK would need no handler, but costs two changes of the signal mask with each exit.
"""

import contextlib
import ctypes
import signal
import threading

from offmap.errors import KernelError

SIGNAL = signal.SIGSTKFLT
"""No kernel sends it (signal(7): unused), so no other part of the process waits for it. It is no realtime signal, which
RLIMIT_SIGPENDING could refuse to deliver."""

_SIG_ERR = ctypes.c_void_p(-1).value


def accept_kicks() -> None:
    """Let the calling thread be kicked, whatever the signal mask that it was started with.

    Raises:
        KernelError: the handler cannot be installed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.signal.restype = ctypes.c_void_p
    # Each thread does it again, in case somebody else has taken it away meanwhile. It is the process's, and stays.
    if libc.signal(ctypes.c_int(SIGNAL), ctypes.cast(libc.abs, ctypes.c_void_p)) == _SIG_ERR:
        raise KernelError(f"signal({SIGNAL.name})", ctypes.get_errno())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {SIGNAL})


def kick(thread: threading.Thread) -> None:
    """Interrupt KVM_RUN of `thread`, which has not ended."""
    if thread.ident is not None:
        with contextlib.suppress(ProcessLookupError):
            signal.pthread_kill(thread.ident, SIGNAL)
