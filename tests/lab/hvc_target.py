"""In a disposable host: a Debian guest on hvc0 at a terminal that is resized. Prints what was seen there, as JSON.

Arguments: options of ``offmap run``.
"""

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time

from offmap.patience import scaled

PATIENCE = 240.0  # seconds for what takes 20 on an idle machine


class Terminal:
    """A terminal, and a program that it is the controlling terminal of."""

    def __init__(self, argv: list[str], rows: int, columns: int) -> None:
        self.fd, self.slave = pty.openpty()
        self.resize(rows, columns)
        self.modes = termios.tcgetattr(self.slave)
        # setsid --ctty: the program gets SIGWINCH, as in a window.
        argv = ["setsid", "--ctty", "--wait", *argv]
        self.program = subprocess.Popen(argv, stdin=self.slave, stdout=self.slave, stderr=subprocess.PIPE)
        self.said = b""
        self._seen = 0

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def expect(self, pattern: bytes) -> bytes:
        """Wait until it has said this after what was waited for last; return its first group."""
        search = re.compile(pattern, re.DOTALL).search
        deadline = time.monotonic() + scaled(PATIENCE)
        while (match := search(self.said, self._seen)) is None:
            if not self._listen(max(deadline - time.monotonic(), 0)):
                self.program.kill()
                sys.exit(f"no {pattern!r} in {self.said[-2000:]!r}")
        self._seen = match.end()
        return match[match.lastindex or 0]

    def _listen(self, seconds: float) -> bool:
        if not select.select([self.fd], [], [], seconds)[0]:
            return False
        self.said += os.read(self.fd, 65536)
        return True

    def keys(self, text: bytes) -> None:
        while text:
            text = text[os.write(self.fd, text) :]

    def shell(self, line: str) -> str:
        """Run a line in the guest's shell; return what it printed."""
        self.keys(f'echo "<""<"; {line}; echo ">"">"\n'.encode())
        return self.expect(rb"<<\s+(.*?)>>").decode().replace("\r", "").strip()

    def end(self) -> str:
        """Show what is said until the program has ended; return what it said on standard error."""
        while self.program.poll() is None:
            self._listen(0.1)
        while self._listen(0):
            pass
        return self.program.communicate()[1].decode()


def main() -> None:
    # Without quiet, so that there is something to be seen at either port.
    argv = [sys.executable, "-m", "offmap", "run", "--console", "virtio", "--cmdline", "console=ttyS0", *sys.argv[1:]]
    terminal = Terminal(argv, 33, 101)
    terminal.expect(rb"login: ")
    boot = terminal.said
    terminal.keys(b"root\n")
    terminal.expect(rb"~# ")
    terminal.keys(b"exec sh\n")
    terminal.expect(rb"# ")
    seen: dict[str, object] = {
        # By the serial port, as it is said (these kernels do not repeat their log on hvc0); afterwards by hvc0 alone.
        "banners": boot.count(b"Linux version"),
        "mounts": boot.count(b"EXT4-fs (vda): mounted"),
        "logins": boot.count(b"login: "),
        "tty": terminal.shell("tty"),
        "release": terminal.shell("uname -r"),
        "first": terminal.shell("stty size"),
    }
    terminal.resize(50, 132)
    seen["second"] = terminal.shell("for n in $(seq 100); do stty size | grep -v ^33 && break; sleep 0.1; done")
    terminal.keys(b"\x01h")
    seen["lines"] = len(terminal.shell("seq 2000").splitlines())
    seen["alarms"] = terminal.shell("dmesg | grep -e WARNING -e BUG:")
    terminal.keys(b"systemctl poweroff\n")
    errors = terminal.end()
    seen["power down"] = terminal.said.count(b"reboot: Power down")
    seen["restored"] = termios.tcgetattr(terminal.slave) == terminal.modes
    print(json.dumps({**seen, "status": terminal.program.returncode, "errors": errors}))


main()
