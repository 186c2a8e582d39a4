"""A guest of libvirt as a process: ``python -m offmap.compare.libvirt_guest DOMAIN.xml NAME CONSOLE``.

The guest lives as long as this process, which has the guest's console, a socket, on its standard input and output. The
modules imported here are few: its start counts as the guest's.
"""

import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_VIRSH = ("virsh", "--quiet", "--connect", "qemu:///system")
_RUN = Path("/run/libvirt/qemu")
_LOGS = Path("/var/log/libvirt/qemu")
_POWERED_OFF = "reason=shutdown"  # libvirt writes it to the guest's log


def qemu_pid(name: str) -> int:
    """The process of a guest's QEMU; -1 if there is none."""
    try:
        return int((_RUN / f"{name}.pid").read_text())
    except (OSError, ValueError):
        return -1


def _virsh(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*_VIRSH, *words], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def _join(console: socket.socket) -> None:
    """Pass what is typed to the console, and what it says to the output, until it ends."""
    with selectors.DefaultSelector() as selector:
        selector.register(console, selectors.EVENT_READ)
        selector.register(0, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is console:
                    if not (data := console.recv(65536)):
                        return
                    sys.stdout.buffer.write(data)
                    sys.stdout.buffer.flush()
                elif data := os.read(0, 65536):
                    console.sendall(data)
                else:
                    selector.unregister(0)


def _why_ended(name: str) -> str:
    """Wait until libvirt has done with a guest; returns the last line of its log."""
    while _virsh("domstate", name).returncode == 0:
        time.sleep(0.05)  # virsh has no word for "wait until it is gone"
    lines = (_LOGS / f"{name}.log").read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "its log is empty"


def main(arguments: Sequence[str]) -> int:
    """Run the guest to its end. Returns 0 if it powered itself off; otherwise the last line of standard error says why.

    Args:
        arguments: its domain, a file; its name; the path of its console's socket.
    """
    domain, name, path = arguments
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    made = _virsh("create", domain, "--paused")
    if made.returncode:
        sys.stderr.write(made.stderr.strip().replace("\n", "; ") + "\n")
        return 1
    try:
        with socket.socket(socket.AF_UNIX) as console:
            console.connect(path)
            _virsh("resume", name)  # once somebody listens
            _join(console)
        why = _why_ended(name)
    finally:
        _virsh("destroy", name)  # fails if it is gone, as it mostly is
    if _POWERED_OFF in why:
        return 0
    sys.stderr.write(f"{why}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
