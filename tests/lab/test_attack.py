"""The attack on real guests: through plain RAM to the secret, to an end on hidden RAM, and through an alias there."""

import json
import sys
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


def attacked(kernel: HostKernel, out: Path, *kinds: str) -> Any:
    """The results, by kind."""
    initrd, learnt = out / "guest.initramfs", out / "learnt.json"
    initrd.write_bytes(guest_initramfs())
    learnt.write_text(json.dumps(learn(kernel.vmlinuz, sorted(kernel.modules.rglob("kvm.ko*"))).to_json()))
    with LabHost.start(kernel, memory="2G", cmdline=RESERVED, out=out) as host:
        for module in (lab_module(kernel), alias_module(kernel), peek_module(kernel)):
            assert host.run(["insmod", str(module)]) == 0
        argv = [sys.executable, TARGET, str(kernel.vmlinuz), str(initrd), str(learnt), *kinds]
        done = host.output(argv, timeout=scaled(240))
        assert done.status == 0, done.stderr.decode()
        log = host.output(["dmesg"]).stdout.decode()
        assert not [line for line in log.splitlines() if "WARNING" in line or "BUG" in line]
    return json.loads(done.stdout)


def check_recovered(result: Any, most: int = MOST_READS) -> None:
    attempt = result["attempt"]
    assert (result["outcome"], attempt["outcome"], attempt["stage"]) == ("recovered", "recovered", "guest: secret"), (
        result
    )
    assert 1000 < attempt["reads"] < most
    assert result["times"]


def check_ends(result: Any) -> None:
    attempt, control = result["attempt"], result["control"]
    assert (result["outcome"], attempt["stage"]) == ("ends", "guest: kernel"), result
    assert attempt["guest_pages"] + attempt["missing_pages"] >= PAGES
    assert control["outcome"] == "recovered" and control["mapped_pages"] == control["guest_pages"] > 1000
    assert 1000 < control["reads"] < MOST_READS
    sizes = {each["name"]: each["bytes"] for each in attempt["residues"]}
    assert sizes["kvm_run"] == 8192 and sizes["registers of the vCPUs, in struct kvm_vcpu"] > 100


def check_sweep(result: Any) -> None:
    """No 16 bytes of the secret stand in anything that the kernel maps, and all of that was read."""
    sweep = result["attempt"]["sweep"]
    assert (sweep["secret_bytes"], sweep["runs"], sweep["pages_unread"]) == (32, [], 0), result
    assert sweep["bytes_read"] > 1700 << 20


def test_hidden_ram_beside_plain_ram_and_with_an_alias(lab_kernel: HostKernel, tmp_path: Path) -> None:
    found = attacked(lab_kernel, tmp_path, "reserved+=")
    for name in ("reserved", "reserved, by command", "reserved, kcore"):
        check_ends(found[name])
        assert found[name]["attempt"]["mapped_pages"] == 0
    assert found["reserved, by command"]["status"] == 0
    check_sweep(found["reserved"])
    # A leak in the VMM's process needs no mapping of the kernel's.
    check_recovered(found["reserved, user memory"])
    assert found["reserved, user memory"]["status"] == 1
    assert found["reserved, user memory"]["attempt"]["user_pages"] > 100
    # What no mapping led to is recovered once there is one.
    check_recovered(found["reserved, aliased"], most=1_000_000)
    assert found["reserved, aliased"]["attempt"]["mapped_pages"] >= PAGES
    # kcore gives zeroes for memory that was remapped.
    assert found["reserved, aliased, kcore"]["outcome"] == "reached"
    assert found["reserved, wrong"]["outcome"] == "unknown"


@pytest.mark.slow
def test_the_other_kinds_of_ram(lab_kernel: HostKernel, tmp_path: Path) -> None:
    found = attacked(lab_kernel, tmp_path, "qemu-memfd", "unplugged", "secretmem-bridge")
    check_recovered(found["qemu-memfd"])
    for name in ("unplugged", "secretmem-bridge"):
        check_ends(found[name])
    assert found["unplugged"]["attempt"]["mapped_pages"] == 0
    # What offmap keeps from its guest is mapped; the secret is in none of it.
    assert found["secretmem-bridge"]["attempt"]["mapped_pages"] < 2000


@pytest.mark.slow
def test_the_same_on_another_kernel(tmp_path: Path) -> None:
    found = attacked(host_kernel("debian:7.3"), tmp_path, "unplugged")
    check_ends(found["unplugged"])
    assert found["unplugged"]["attempt"]["mapped_pages"] == 0
