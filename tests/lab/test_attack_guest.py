"""What a guest that attacks its VMM gets on a real host: on hidden memory, with a tap, beside another guest."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from offmap.kmod.lab_build import lab_module
from offmap.lab.host import LabHost

from .console import Guest
from .test_module import insert

pytestmark = pytest.mark.lab

SANDBOX = """
import json, sys
from offmap.audit.process import Process
from offmap.audit.vmm_sandbox import vmm_sandbox
with Process(int(sys.argv[1])) as process:
    print(json.dumps(vmm_sandbox(process).to_json()))
"""
TAP = "tap=oft1,address=198.18.1.1/24"


@pytest.fixture(scope="module")
def host(lab_host: LabHost) -> Iterator[LabHost]:
    """Give the shared host with offmap.ko and taps."""
    assert lab_host.options.out is not None
    insert(lab_host, lab_module(lab_host.kernel), lab_host.options.out)
    done = lab_host.output(["sh", "-c", "PATH=$PATH:/usr/sbin:/sbin modprobe tun"])
    assert done.status == 0, done.stderr
    yield lab_host
    assert lab_host.output(["rmmod", "offmap"]).status == 0


@pytest.fixture(scope="module")
def guests(lab_host: LabHost, payload: Callable[[str], Path]) -> dict[str, Path]:
    """Give the guests that need no Linux, where the shared host can see them."""
    assert lab_host.options.out is not None
    found = {}
    for name in ("monitor", "attack"):
        found[name] = lab_host.options.out / f"{name}.elf"
        found[name].write_bytes(payload(name).read_bytes())
    return found


def sandbox(host: LabHost, guest: Guest) -> dict[str, Any]:
    """What the audit says of a VMM."""
    done = host.output([sys.executable, "-c", SANDBOX, str(guest.pid)])
    assert done.status == 0, done.stderr.decode()
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def image(host: LabHost) -> Path:
    """A drive's image that is on a file system of the host's own."""
    path = Path("/tmp/attacked.img")
    assert host.output(["sh", "-c", f"dd if=/dev/zero of={path} bs=1M count=0 seek=64 2>/dev/null"]).status == 0
    return path


@pytest.mark.parametrize("memory", ["memfd", "reserved", "unplugged", "secretmem-bridge"])
def test_no_descriptor_of_a_vmm_leads_further(host: LabHost, guests: dict[str, Path], memory: str) -> None:
    devices = ("--drive", str(image(host)), "--rng", "--net", TAP, "--vsock", "cid=3,path=/run/attacked.sock")
    options = ("--memory", memory, "--memory-size", "32M", "--vcpus", "2", *devices)
    with Guest(host, guests["monitor"], *options) as guest:
        guest.expect("U")
        found = sandbox(host, guest)
        assert found["descriptors"] == []
        assert (found["capabilities"], found["no_new_privs"], found["seccomp"]) == ([], True, "filter")
        assert (found["mounts"], found["dumpable"]) == (1, False)
        guest.keys("q")
        assert guest.end() == 0, guest.errors


def test_the_control(host: LabHost, guests: dict[str, Path]) -> None:
    """Without the sandbox there is one; and each kind is known from a process that has it."""
    with Guest(host, guests["monitor"], "--memory", "reserved", "--memory-size", "32M", "--no-sandbox") as guest:
        guest.expect("U")
        assert "physical memory" in {each["kind"] for each in sandbox(host, guest)["descriptors"]}
        guest.keys("q")
        assert guest.end() == 0, guest.errors
    opened = "import os\nkept = [os.open(name, 0) for name in ('/dev/offmap', '/dev/kvm', '/dev/mem', '/proc')]\n"
    done = host.output([sys.executable, "-c", opened + SANDBOX.replace("int(sys.argv[1])", "os.getpid()")])
    kinds = {each["kind"] for each in json.loads(done.stdout)["descriptors"]}
    assert {"/dev/offmap", "/dev/kvm", "physical memory", "directory"} <= kinds, done.stderr


def test_an_attack_on_hidden_memory_gets_nowhere(host: LabHost, guests: dict[str, Path]) -> None:
    devices = ("--drive", str(image(host)), "--rng", "--net", TAP, "--vsock", "cid=3,path=/run/attacked.sock")
    with (
        Guest(host, guests["monitor"], "--memory", "reserved", "--memory-size", "64M") as victim,
        Guest(host, guests["attack"], "--memory", "reserved", "--memory-size", "128M", *devices) as attacker,
    ):
        victim.expect("U")
        victim.keys("f")
        victim.expect("F")
        attacker.expect("U")
        for _ in range(8):
            assert attacker.expect(r"([.!])\n") == "."
            victim.keys("a")
            victim.expect("a")
        victim.keys("z")
        victim.expect("D")  # what it has filled its memory with is there
        attacker.command.send_signal(15)
        assert attacker.end() == 2
        assert attacker.errors.endswith("offmap run: stopped by SIGTERM\n"), attacker.errors
        assert "failed unexpectedly" not in attacker.errors
        victim.keys("q")
        assert victim.end() == 0, victim.errors
    log = host.output(["dmesg"]).stdout.decode()
    assert "BUG:" not in log and "Oops" not in log
