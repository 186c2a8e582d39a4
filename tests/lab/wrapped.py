"""What the tests of wrapped VMMs share: a host with the module, a released Firecracker, and what is heard."""

import json
import re
import shutil
import struct
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from offmap.compare.guest import guest_initramfs
from offmap.kmod.lab_build import lab_module
from offmap.lab.command import LabCommand
from offmap.lab.firecracker import released_firecracker
from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel
from offmap.lab.vmlinux import vmlinux_of
from offmap.patience import scaled

from . import prepared
from .alias_module import alias_module
from .conftest import keep_still
from .console import CMDLINE

ROOT = Path(__file__).parents[2]
PATIENCE = 60.0  # seconds on an idle machine
PT_NULL, PT_NOTE = 0, 4
OFFMAP = [sys.executable, "-m", "offmap"]


class Started:
    """A command in the host that is listened to while it runs: its output and its errors, each for itself.

    A line of one may come in the middle of a line of the other.
    """

    def __init__(self, host: LabHost, argv: list[str]) -> None:
        self._heard = {"output": "", "errors": ""}
        self._more = threading.Condition()
        heard = [partial(self._hear, name) for name in self._heard]
        self.command: LabCommand = host.popen(argv, stdout=heard[0], stderr=heard[1], keep_stdin=True, cwd=ROOT)

    def _hear(self, name: str, data: bytes) -> None:
        with self._more:
            self._heard[name] += data.decode(errors="replace")
            self._more.notify_all()

    def _find(self, pattern: str) -> str | None:
        found = (re.search(pattern, heard, re.MULTILINE) for heard in self._heard.values())
        return next((match[1] for match in found if match), None)

    def await_(self, pattern: str) -> str:
        """Wait until its output or its errors have this; returns what the first group matches."""
        with self._more:
            self._more.wait_for(lambda: self._find(pattern) is not None, scaled(PATIENCE))
            found = self._find(pattern)
            assert found is not None, self._all()
            return found

    def _all(self) -> str:
        return "\n".join(self._heard.values())

    def end(self) -> str:
        """Kill it, if it runs; returns all that it said."""
        self.command.kill()
        self.command.wait(scaled(PATIENCE))
        return self._all()


@contextmanager
def module_host(kernel: HostKernel, out: Path) -> Iterator[LabHost]:
    """A disposable host with the module, whose kernel must have nothing to complain of in the end."""
    with LabHost.start(kernel, memory="2G", accel="tcg", out=out) as host:
        keep_still(host)
        shutil.copy(module := lab_module(kernel), out)
        assert host.output(["insmod", str(out / module.name)]).status == 0
        (out / "guest.initramfs").write_bytes(guest_initramfs())
        yield host
        log = host.output(["dmesg"]).stdout.decode()
        assert not re.search(r"WARNING:|BUG:", log), log


@pytest.fixture(scope="module")
def host(lab_kernel: HostKernel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabHost]:
    out = tmp_path_factory.mktemp("out")
    with module_host(lab_kernel, out) as host:
        shutil.copy(module := alias_module(host.kernel), out)
        assert host.output(["insmod", str(out / module.name)]).status == 0
        yield host


def audit(host: LabHost, pid: int) -> Any:
    """What an audit says; once more, as it says itself, if the kernel moved memory meanwhile."""
    for _ in range(5):
        result = json.loads(prepared.run(host, "offmap", "audit", str(pid), "--json").stdout)
        if result["verdict"] != "unknown" or not any("run it again" in note for note in result["notes"]):
            break
    return result


def without_notes(vmlinux: bytes) -> bytes:
    """A kernel that does not say that it can be booted by PVH: so a VMM boots it by Linux's 64-bit protocol."""
    changed = bytearray(vmlinux)
    (first,), (size, count) = struct.unpack_from("<Q", changed, 32), struct.unpack_from("<HH", changed, 54)
    for at in range(first, first + size * count, size):
        if changed[at] == PT_NOTE:
            changed[at] = PT_NULL
    return bytes(changed)


@pytest.fixture(scope="module")
def firecracker(request: pytest.FixtureRequest, host: LabHost) -> Path:
    """Give a Firecracker, and put in /run what its guests boot."""
    assert host.options.out is not None
    vmlinux = vmlinux_of(host.kernel.vmlinuz).read_bytes()
    (host.options.out / "vmlinux").write_bytes(vmlinux)
    (host.options.out / "vmlinux-64").write_bytes(without_notes(vmlinux))
    # The output folder is uncached 9p, which cannot read into hidden memory.
    files = [str(host.options.out / name) for name in ("vmlinux", "vmlinux-64", "guest.initramfs")]
    assert host.run(["cp", *files, "/run"]) == 0
    given = request.config.getoption("--firecracker")
    return Path(given).absolute() if given else released_firecracker()


@pytest.fixture(scope="module")
def boot_source(host: LabHost, firecracker: Path) -> dict[str, str]:
    """Give the guest's kernel. It has no clock but the TSC, and nothing to measure that by: the wrapper tells it."""
    quiet = "i8042.noaux i8042.nomux i8042.dumbkbd"  # Firecracker logs reads of ports that it does not have
    words = f"{CMDLINE} reboot=k panic=1 pci=off {quiet}"
    return {"kernel_image_path": "/run/vmlinux", "initrd_path": "/run/guest.initramfs", "boot_args": words}


def config(boot_source: dict[str, str], out: Path, name: str) -> str:
    """A configuration file for Firecracker."""
    machine = {"vcpu_count": 1, "mem_size_mib": 128}
    (out / name).write_text(json.dumps({"boot-source": boot_source, "drives": [], "machine-config": machine}))
    return str(out / name)


LOG = ["--log-path", "/proc/self/fd/2"]  # Firecracker's, which else comes in the middle of its guest's lines
HIDDEN = r"offmap wrap: process (\d+): HIDDEN: none of the \d+ guest pages of firecracker"


def call(host: LabHost, path: str, *calls: tuple[str, str, object]) -> None:
    """Make calls to Firecracker's API, by the socket at `path`."""
    done = _call(host, path, calls)
    assert done.status == 0, done.stderr


def failed_call(host: LabHost, path: str, method: str, resource: str, body: object) -> str:
    """Make a call that fails; returns what it is answered."""
    done = _call(host, path, [(method, resource, body)])
    assert done.status == 1
    return done.stderr


def _call(host: LabHost, path: str, calls: Sequence[tuple[str, str, object]]) -> prepared.Ran:
    return prepared.run(host, "tests.lab.firecracker_api", path, json.dumps(calls))
