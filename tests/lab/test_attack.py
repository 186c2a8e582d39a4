"""The attack on real guests: through plain RAM to the secret, to an end on hidden RAM, and through an alias there."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from offmap.attack.knowledge import learn
from offmap.compare.guest import guest_initramfs
from offmap.kmod.lab_build import lab_module
from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel
from offmap.lab.provision import host_kernel
from offmap.patience import scaled

from .alias_module import alias_module, peek_module
from .conftest import RESERVED

pytestmark = pytest.mark.lab

TARGET = str(Path(__file__).with_name("attack_target.py"))
PAGES = (256 << 20) // 4096
MOST_READS = 200_000


class Lab:
    """A host with the modules, and what an attacker knows of its kernel."""

    def __init__(self, host: LabHost, kernel: HostKernel, folder: Path) -> None:
        self._host, self._kernel, self._folder = host, kernel, folder
        (folder / "guest.initramfs").write_bytes(guest_initramfs())
        kernel_modules = sorted(kernel.modules.rglob("kvm.ko*"))
        self.known = learn(kernel.vmlinuz, kernel_modules).to_json()

    def attack(self, primitive: str, *kinds: str, **changes: Any) -> Any:
        """The results by kind."""
        learnt = self._folder / "learnt.json"
        learnt.write_text(json.dumps({**self.known, **changes}))
        argv = [sys.executable, TARGET, str(self._kernel.vmlinuz), str(self._folder / "guest.initramfs"), str(learnt)]
        done = self._host.output([*argv, primitive, *kinds], timeout=scaled(200))
        assert done.status == 0, done.stderr.decode()
        return json.loads(done.stdout)


def lab(kernel: HostKernel, out: Path) -> Iterator[Lab]:
    with LabHost.start(kernel, memory="2G", cmdline=RESERVED, out=out) as host:
        for module in (lab_module(kernel), alias_module(kernel), peek_module(kernel)):
            assert host.run(["insmod", str(module)]) == 0
        yield Lab(host, kernel, out)
        log = host.output(["dmesg"]).stdout.decode()
        assert not [line for line in log.splitlines() if "WARNING" in line or "BUG" in line]


@pytest.fixture(scope="module")
def here(lab_kernel: HostKernel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    yield from lab(lab_kernel, tmp_path_factory.mktemp("out"))


def check_recovered(result: Any, most: int = MOST_READS) -> None:
    assert (result["status"], result["outcome"]) == (1, "recovered"), result
    assert result["attempt"]["stage"] == "guest: secret"
    assert 1000 < result["attempt"]["reads"] < most


def check_ends(result: Any) -> None:
    attempt, control = result["attempt"], result["control"]
    assert (result["status"], result["outcome"]) == (0, "ends"), result
    assert attempt["stage"] == "guest: kernel"
    assert attempt["mapped_pages"] == 0
    assert attempt["guest_pages"] + attempt["missing_pages"] >= PAGES
    assert control["outcome"] == "recovered" and control["mapped_pages"] == control["guest_pages"] > 1000
    sizes = {each["name"]: each["bytes"] for each in attempt["residues"]}
    assert sizes["kvm_run"] == 8192 and sizes["registers of the vCPUs, in struct kvm_vcpu"] > 100


def test_plain_ram_hidden_ram_and_an_alias(here: Lab) -> None:
    found = here.attack("module", "qemu-memfd", "reserved+alias")
    check_recovered(found["qemu-memfd"])
    check_recovered(found["qemu-memfd"]["control"] | {"status": 1, "attempt": found["qemu-memfd"]["control"]})
    check_ends(found["reserved"])
    # What no mapping led to is recovered once there is one.
    check_recovered(found["reserved, aliased"], most=1_000_000)
    assert found["reserved, aliased"]["attempt"]["mapped_pages"] >= PAGES


def test_kcore_reads_the_same_and_reaches_what_it_cannot_read(here: Lab) -> None:
    found = here.attack("kcore", "reserved+alias")
    check_ends(found["reserved"])
    # kcore gives zeroes for memory that was remapped.
    aliased = found["reserved, aliased"]
    assert (aliased["status"], aliased["outcome"]) == (1, "reached"), aliased


def test_wrong_knowledge_is_never_an_end(here: Lab) -> None:
    offsets = dict(here.known["offsets"])  # type: ignore[call-overload]
    offsets["task_struct.mm"] += 8
    found = here.attack("module", "reserved", offsets=offsets)
    assert (found["reserved"]["status"], found["reserved"]["outcome"]) == (3, "unknown"), found


@pytest.mark.slow
def test_the_other_hidden_kinds(here: Lab) -> None:
    found = here.attack("module", "unplugged", "secretmem-bridge", "qemu-unplugged")
    for result in (found["unplugged"], found["secretmem-bridge"]):
        check_ends(result)
    # QEMU's firmware is no part of its memory file.
    result = found["qemu-unplugged"]
    assert (result["status"], result["outcome"]) == (0, "ends"), result
    assert result["attempt"]["mapped_pages"] <= 64


@pytest.mark.slow
def test_the_same_on_another_kernel(tmp_path: Path) -> None:
    for there in lab(host_kernel("debian:7.3"), tmp_path):
        found = there.attack("module", "memfd", "reserved")
        check_recovered(found["memfd"])
        check_ends(found["reserved"])
