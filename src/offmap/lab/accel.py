"""Whether to run a disposable host under KVM or in emulation.

Some /dev/kvm run no ordinary kernel, and many have no nested virtualisation, which a lab host needs for /dev/kvm of
its own. Neither can be told from outside, so a small host is booted; the answer holds until this machine reboots.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

from offmap.lab.cache import cache_folder, write_atomically
from offmap.lab.installed import boot_id
from offmap.lab.kernel import HostKernel
from offmap.lab.qemu import find_qemu, qemu_version

SIGN_OF_LIFE_SECONDS = 5.0  # to the first byte on the console; under a working KVM it is 0.3
PROBE_SECONDS = 30.0  # to the agent; under a working KVM it is 2

# Run inside the probed host: KVM_GET_API_VERSION, KVM_CREATE_VM (_IO(0xAE, 0x00 and 0x01), linux/kvm.h).
NESTED_PROBE = (
    "import fcntl, os; fd = os.open('/dev/kvm', os.O_RDWR); "
    "raise SystemExit(not (fcntl.ioctl(fd, 0xAE00, 0) == 12 and fcntl.ioctl(fd, 0xAE01, 0) > 0))"
)
_DEVICE = Path("/dev/kvm")


def choose(kernel: HostKernel, probe: Callable[[], bool]) -> str:
    """Return ``kvm`` or ``tcg``; ``probe`` is asked at most once per boot, kernel and QEMU."""
    if not os.access(_DEVICE, os.R_OK | os.W_OK):
        return "tcg"
    memory = cache_folder() / "accel.json"
    version = qemu_version(find_qemu())
    boot = boot_id()
    key = f"{kernel.release} {version}"
    known: dict[str, bool] = {}
    try:
        content = json.loads(memory.read_text())
        if content["boot"] == boot:
            known = dict(content["kvm"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing known, or unreadable: ask again
    if not isinstance(known.get(key), bool):
        known[key] = probe()
        write_atomically(memory, json.dumps({"boot": boot, "kvm": known}).encode())
    return "kvm" if known[key] else "tcg"
