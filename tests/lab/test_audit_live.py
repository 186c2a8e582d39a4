"""The audit of processes that are tampered with, shared, watched and killed; each absence beside what is found."""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from offmap.audit.reach import Kind
from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel
from offmap.lab.provision import host_kernel
from offmap.patience import scaled

from .alias_module import alias_module
from .conftest import soak, words_for

pytestmark = pytest.mark.lab

TARGET = str(Path(__file__).with_name("audit_live_target.py"))
PAGES = 1024  # of a child, unless it says otherwise
VMALLOC = "vmalloc/ioremap space"
PATIENCE = 120.0  # seconds on an idle machine

Found = dict[str, Any]


def ask(host: LabHost, *scenarios: str) -> Found:
    """Run scenarios in the host, with the module that plants mappings."""
    assert host.options.out is not None
    module = host.options.out / "offmap_alias.ko"
    shutil.copy(alias_module(host.kernel), module)
    assert host.output(["insmod", str(module)]).status == 0
    try:
        done = host.output([sys.executable, TARGET, *scenarios], timeout=scaled(PATIENCE))
        assert done.status == 0, done.stderr.decode()
        found: Found = json.loads(done.stdout)
        return found
    finally:
        assert host.output(["rmmod", "offmap_alias"]).status == 0
        assert not re.search(r"WARNING:|BUG:", host.output(["dmesg"]).stdout.decode())


def in_vmalloc(result: Found) -> list[Found]:
    """The aliases that are not of the kernel image, which secret memory may have."""
    return [alias for alias in result["aliases"] if alias["kind"] != "kernel_image"]


def check_aliases(found: Found) -> None:
    for value, kind, caller in ((1, "vmap", r"alias_(write|vmap)\+0x.*\[offmap_alias\]"), (0, "vmalloc_space", "")):
        result = found[f"vmap, kptr_restrict={value}"]
        assert result["verdict"] == "exposed"
        planted = in_vmalloc(result)
        assert [alias["pa"] for alias in planted] == found["wanted"]
        for alias in planted:
            assert (alias["kind"], alias["region"], alias["bytes"]) == (kind, VMALLOC, 4096)
            assert (alias["writable"], alias["executable"], alias["page_size"]) == (True, False, 4096)
            assert re.fullmatch(caller, alias["caller"])
        assert result["pages"]["alias_pages"] == found["image"] + 3
        # What it cannot name, it says.
        assert any("kptr_restrict" in note for note in result["notes"]) == (value == 0)
    assert in_vmalloc(found["vmap, gone"]) == []
    assert found["vmap, gone"]["pages"]["alias_pages"] == found["image"]
    for value in (1, 0):
        result = found[f"memremap, kptr_restrict={value}"]
        (alias,) = result["aliases"]
        assert (alias["kind"], alias["pa"], alias["bytes"]) == ("memremap", "0x60100000", 4 * 4096)
        assert alias["caller"].startswith("memremap+0x")
        assert alias["guest_phys_addr"] == 1 << 20
        assert (result["verdict"], result["pages"]["alias_pages"]) == ("exposed", 4)
    for name in ("none", "memremap, gone"):
        assert (found[name]["verdict"], found[name]["aliases"]) == ("hidden", [])


def check_middle(found: Found) -> None:
    assert (found["nothing"]["verdict"], found["nothing"]["partial"]) == ("hidden", None)
    assert found["fork"]["verdict"] == "hidden"
    for how, what in (
        ("exit", "ended during the audit"),
        ("kill", "ended during the audit"),
        ("exec", "replaced its program during the audit"),
        ("kill, exposed", "ended during the audit"),
    ):
        result = found[how]
        assert result["verdict"] == "unknown"
        assert what in result["partial"]
        pages = result["pages"]
        assert (pages["pages_populated"], pages["unknown_pages"], pages["mapped_pages"]) == (0, PAGES, 0)
        assert any(f"{PAGES} pages of it were seen" in note for note in result["notes"])
    pages = found["remap"]["pages"]
    assert found["remap"]["verdict"] == "unknown"
    assert (pages["pages_populated"], pages["unknown_pages"]) == (PAGES // 2, PAGES // 2)
    assert pages["unknown_reasons"] == {"came, went or moved during the audit": PAGES // 2}
    assert found["zombie"][1] == 3
    assert "ended" in found["zombie"][0]


def check_every(found: Found) -> None:
    assert found["exit_status"] == 1
    assert len(found["pids"]) == 3
    assert found["notes"] == []
    assert found["hidden"]["verdict"] == "hidden"
    assert found["exposed"]["verdict"] == "exposed"
    assert (found["hidden"]["vmm"]["vms"], found["hidden"]["vmm"]["vcpus"]) == (1, 1)
    # What else of the process is as large as RAM is not told from it; but the guess is never called hidden.
    assert found["guessed"]["verdict"] in {"exposed", "unknown"}
    assert any("guesses" in note for note in found["guessed"]["notes"])


def check_sharers(found: Found) -> None:
    assert (found["alone"]["sharing"]["shared_pages"], found["alone"]["sharing"]["processes"]) == (0, [])
    sharing = found["fork"]["sharing"]
    assert (sharing["shared_pages"], [each["pages"] for each in sharing["processes"]]) == (PAGES, [PAGES])
    sharing = found["file"]["sharing"]
    # The auditor maps 16 of them too and is counted; it names the other.
    assert sharing["shared_pages"] == 16
    assert [(each["pid"], each["pages"]) for each in sharing["processes"]] == [(found["file"]["pid"], 8)]


def check_merged(found: Found) -> None:
    pages = found["pages"]
    assert (pages["pages_populated"], pages["direct_map_pages"], pages["unknown_pages"]) == (64, 64, 0)
    sharing = found["sharing"]
    assert sharing["shared_pages"] == 64
    assert [(each["pid"], each["pages"]) for each in sharing["processes"]] == [(found["other"], 64)]


def check_watched(found: Found) -> None:
    assert found["nothing"]["pages"] == {}
    assert found["populated"]["pages"] == {"populated": 4}
    changes = found["populated"]["changes"]
    assert (changes[0]["guest_phys_addr"], sum(each["bytes"] for each in changes)) == (100 * 4096, 4 * 4096)
    assert all(each["kinds"] == ["direct_map"] for each in changes)
    assert found["punched"]["pages"] == {"gone": 1}
    assert found["remapped"]["pages"] == {"moved": PAGES // 2}
    assert all(change["pa"] != change["pa_before"] for change in found["remapped"]["changes"])
    (change,) = found["mapped"]["changes"]
    assert (change["what"], change["kinds"], change["kinds_before"]) == ("mapped", ["memremap"], [])
    assert change["reaches"][0]["region"] == VMALLOC
    assert found["unmapped"]["pages"] == {"unmapped": 1}
    assert found["unmapped"]["verdict"] == "hidden"


def check_beside_ram(found: Found) -> None:
    """Memory that is mapped and is not System RAM may hold a copy, and cannot be read."""
    result = found["mapped"]
    unread = 4 + 2 + 512 + 2
    assert (result["verdict"], result["scan"]["frames_unread"], result["scan"]["found"]) == ("unknown", unread, [])
    assert any(f"{unread} mapped pages of memory were not scanned" in note for note in result["notes"])
    # Registers and firmware's tables are mapped all the same.
    result = found["gone"]
    assert (result["verdict"], result["scan"]["frames_unread"]) == ("hidden", 0)
    assert result["scan"]["device_pages"] > 0 and not any("not scanned" in note for note in result["notes"])


def check_behind_image(found: Found) -> None:
    """What is mapped there is in no segment of kcore."""
    result = found["mapped"]
    assert (result["verdict"], result["scan"]["frames_unread"]) == ("exposed", 0)
    assert [each["canary"] for each in result["scan"]["found"]] == found["pages"]
    for each in result["scan"]["found"]:
        assert [place["region"] for place in each["places"]] == ["kernel text mapping"]
    # The kernel maps the rest of 2 MiB behind its image itself. How much of it became the secret memory is luck.
    result = found["unmapped, without BPF"]
    unread = result["scan"]["frames_unread"]
    assert unread <= 512
    assert (result["verdict"], result["scan"]["found"]) == ("unknown" if unread else "hidden", [])
    result = found["mapped, without BPF"]
    assert (result["verdict"], result["scan"]["frames_unread"], result["scan"]["found"]) == ("unknown", unread + 3, [])
    for name in ("unmapped", "wiped"):
        result = found[name]
        assert (result["verdict"], result["scan"]["frames_unread"], result["scan"]["found"]) == ("hidden", 0, [])


def check_mappings(found: Found) -> None:
    for kind in ("anon", "thp", "hugetlb"):
        pages = found[kind]["pages"]
        assert pages["direct_map_pages"] == pages["pages_populated"] == PAGES, kind
        assert found[kind]["verdict"] == "exposed"
        # The kernel may map one of them elsewhere for a moment.
        assert sum(total["pages"] for total in found[kind]["reach"] if total["kind"] == Kind.DIRECT_MAP) == PAGES
    for kind in ("reserved", "secretmem"):
        pages = found[kind]["pages"]
        assert (pages["pages_populated"], pages["direct_map_pages"], pages["unknown_pages"]) == (PAGES, 0, 0)
    assert found["reserved"]["verdict"] == "hidden"


CHECKS = {
    "aliases": check_aliases,
    "middle": check_middle,
    "every": check_every,
    "sharers": check_sharers,
    "merged": check_merged,
    "watched": check_watched,
    "beside_ram": check_beside_ram,
    "behind_image": check_behind_image,
    "mappings": check_mappings,
}


@pytest.fixture(scope="module")
def found(lab_host: LabHost) -> Iterator[Found]:
    """Give what all scenarios found: one process runs them, as each start of Python takes seconds there."""
    yield ask(lab_host, *CHECKS)


@pytest.mark.parametrize("scenario", CHECKS)
def test_live(found: Found, scenario: str) -> None:
    CHECKS[scenario](found[scenario])


@pytest.mark.slow
@pytest.mark.parametrize("series", [soak("6.1"), "7.3"])
def test_other_kernels(series: str, tmp_path: Path) -> None:
    kernel: HostKernel = host_kernel(f"debian:{series}")
    with LabHost.start(kernel, memory="2G", cmdline=words_for(kernel), out=tmp_path) as host:
        found = ask(host, *CHECKS)
    for scenario, check in CHECKS.items():
        check(found[scenario])


@pytest.mark.slow
@pytest.mark.parametrize("mounted", [True, False])
def test_lockdown_cannot_be_determined(lab_kernel: HostKernel, mounted: bool) -> None:
    audit = [sys.executable, "-m", "offmap", "audit", "1", "--range", "0x400000:4K"]
    with LabHost.start(lab_kernel, memory="1G") as host:
        assert host.output(["mount", "-t", "securityfs", "none", "/sys/kernel/security"]).status == 0

        def lock(level: str) -> tuple[int, str]:
            done = host.output(["sh", "-c", f"echo {level} > /sys/kernel/security/lockdown"])
            assert done.status == 0, done.stderr
            if not mounted:
                host.output(["umount", "/sys/kernel/security"])
            done = host.output(audit)
            host.output(["mount", "-t", "securityfs", "none", "/sys/kernel/security"])
            return done.status, done.stderr.decode()

        # The lesser level leaves kcore open: whatever the audit says of that page, it is not that.
        status, errors = lock("integrity")
        assert status in {1, 3} and "kcore" not in errors
        status, errors = lock("confidentiality")
        assert status == 3
        assert "kcore" in errors and "without kernel lockdown" in errors and errors.count("\n") == 1
