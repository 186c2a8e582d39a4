"""The audit on real kernels: what is exposed is found, what is hidden is not, and what cannot be seen is neither."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from offmap.audit.canary import new_key
from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel
from offmap.patience import scaled

from . import prepared

pytestmark = pytest.mark.lab

TARGET = str(Path(__file__).with_name("audit_target.py"))
MIB = 16
PAGES = (MIB << 20) // 4096
CANARIES = 64
KERNEL_TEXT = "kernel text mapping"


def audit(host: LabHost, kind: str, *statuses: int, scan: bool = True, mib: int = MIB, bare: bool = False) -> Any:
    """Audit memory of one kind in the host, which must end in one of the statuses; give the result.

    Args:
        bare: by processes that begin as any program does, with no memory but what they need.
    """
    key = new_key()
    words = [kind, key, str(mib), "--json", *(["--canary", key] if scan else [])]
    if bare:
        status, output, errors = by_command(host, *words)
    else:
        status, output, errors = prepared.run(host, "tests.lab.audit_target", *words)
    assert status in statuses, (output[-2000:], errors)
    return json.loads(output)


def by_command(host: LabHost, *words: str) -> prepared.Ran:
    done = host.output([sys.executable, TARGET, *words])
    return prepared.Ran(done.status, done.stdout.decode(), done.stderr.decode())


def refused(host: LabHost, status: int, *command: str) -> str:
    """Run a command that must fail with this status and one line."""
    done = host.output(list(command))
    text = done.stderr.decode()
    assert (done.status, done.stdout) == (status, b""), (done.stdout, text)
    assert text.count("\n") == 1, text
    return text


def found_in_guest(result: Any) -> set[int]:
    return {hit["canary"] for hit in result["scan"]["found"] if any(place["in_guest"] for place in hit["places"])}


def test_anonymous_memory_is_exposed_and_every_canary_is_found(lab_host: LabHost) -> None:
    result = audit(lab_host, "anon", 1)
    pages = result["pages"]
    assert result["verdict"] == "exposed"
    assert pages["direct_map_pages"] == pages["pages_populated"] == pages["ram_pages"] == PAGES
    assert pages["unknown_pages"] == 0
    assert found_in_guest(result) == set(range(CANARIES))
    assert result["host"]["lab"] is True
    assert result["walk"]["seconds"] < scaled(2.0)
    assert result["walk"]["unreadable"] == []


def test_reserved_memory_is_hidden_and_no_canary_is_found(lab_host: LabHost) -> None:
    result = audit(lab_host, "reserved", 0)
    pages = result["pages"]
    assert result["verdict"] == "hidden"
    assert pages["pages_populated"] == pages["ram_pages"] == PAGES
    assert (pages["direct_map_pages"], pages["alias_pages"], pages["unknown_pages"]) == (0, 0, 0)
    assert pages["canaries_found"] == 0
    assert result["scan"]["bytes_scanned"] > 1 << 30


def check_secret(result: Any, size: int) -> None:
    """What must be so of secret memory, whether pages of it happen to have aliases or not."""
    pages = result["pages"]
    assert (pages["pages_populated"], pages["unknown_pages"], pages["direct_map_pages"]) == (size, 0, 0)
    assert {alias["region"] for alias in result["aliases"]} <= {KERNEL_TEXT}
    assert sum(alias["bytes"] for alias in result["aliases"]) // 4096 == pages["alias_pages"] == pages["mapped_pages"]
    assert result["verdict"] == ("exposed" if pages["alias_pages"] else "hidden")
    aliased = [(int(a["pa"], 16), int(a["pa"], 16) + a["bytes"]) for a in result["aliases"]]
    for hit in result["scan"]["found"]:
        for place in hit["places"]:
            assert place["in_guest"] and place["region"] == KERNEL_TEXT
            assert any(start <= int(place["pa"], 16) < end for start, end in aliased)


def test_secret_memory_of_a_fresh_host_is_read_through_the_kernel_image_or_nowhere(lab_kernel: HostKernel) -> None:
    # Pages freed from the kernel image keep their image mapping. Half of the host's memory mostly has some of them, but
    # the allocator owes us none. (test_audit_live.py has a module make aliases, which are always there.)
    mib = 512
    with LabHost.start(lab_kernel, memory="1G", fresh=True) as host:
        result = audit(host, "secretmem-full", 0, 1, mib=mib, bare=True)
        check_secret(result, (mib << 20) // 4096)
        # Each of its pages holds a canary: those with an alias, and no others, are read.
        assert result["pages"]["canaries_found"] == result["pages"]["alias_pages"]


def test_memfd_pages_that_were_never_written_hold_nothing(lab_host: LabHost) -> None:
    pages = audit(lab_host, "memfd", 1)["pages"]
    assert pages["pages_populated"] == pages["direct_map_pages"] == CANARIES
    assert pages["not_populated_pages"] == PAGES - CANARIES
    assert pages["unknown_pages"] == 0


def test_memfd_pages_that_only_another_mapping_touched_are_found(lab_host: LabHost) -> None:
    result = audit(lab_host, "memfd-elsewhere", 1)
    assert result["pages"]["pages_populated"] == result["pages"]["direct_map_pages"] == CANARIES
    assert result["pages"]["unknown_pages"] == 0
    assert found_in_guest(result) == set(range(CANARIES))


def test_hugetlb_pages_are_exposed_and_the_rest_of_the_file_holds_nothing(lab_host: LabHost) -> None:
    count = "/proc/sys/vm/nr_hugepages"
    assert lab_host.output(["sh", "-c", f"echo {MIB // 2} > {count}; cat {count}"]).stdout == b"%d\n" % (MIB // 2)
    try:
        result = audit(lab_host, "hugetlb", 1)
        pages = result["pages"]
        assert pages["pages_populated"] == pages["direct_map_pages"] == PAGES
        assert pages["unknown_pages"] == 0
        assert found_in_guest(result) == set(range(CANARIES))
    finally:
        lab_host.output(["sh", "-c", f"echo 0 > {count}"])


def test_guessed_ram_can_be_exposed_but_not_hidden(lab_host: LabHost) -> None:
    exposed = audit(lab_host, "anon-guess", 1, bare=True)
    assert found_in_guest(exposed) == set(range(CANARIES))
    hidden = audit(lab_host, "reserved-guess", 3, scan=False, bare=True)
    assert {part["source"] for part in hidden["ranges"]} == {"guess"}
    assert (hidden["pages"]["pages_populated"], hidden["pages"]["mapped_pages"]) == (PAGES, 0)
    assert any("guesses" in note for note in hidden["notes"])


def test_secret_pages_that_only_another_mapping_touched_are_found(lab_host: LabHost) -> None:
    check_secret(audit(lab_host, "secretmem-elsewhere", 0, 1), PAGES)


def test_claim_outside_the_mappings_is_unknown(lab_host: LabHost) -> None:
    result = audit(lab_host, "reserved-unmapped", 3, scan=False)
    assert result["verdict"] == "unknown"
    assert result["pages"]["unknown_reasons"] == {"not mapped by the process": PAGES}


def test_no_kcore_cannot_be_determined(lab_host: LabHost) -> None:
    script = 'mount --bind /dev/null /proc/kcore && exec "$@"'
    text = refused(
        lab_host, 3, "unshare", "-m", "sh", "-c", script, "sh", sys.executable, TARGET, "reserved", new_key(), "1"
    )
    assert "/proc/kcore" in text


@pytest.mark.parametrize("capability", ["sys_admin", "sys_rawio"])
def test_without_a_capability_it_cannot_be_determined(lab_host: LabHost, capability: str) -> None:
    text = refused(
        lab_host, 3, "setpriv", f"--bounding-set=-{capability}", sys.executable, TARGET, "anon", new_key(), "1"
    )
    assert "CAP_SYS" in text


def test_wrong_use_ends_in_one_line(lab_host: LabHost) -> None:
    command = (sys.executable, "-m", "offmap.cli.main", "audit")
    assert "no process" in refused(lab_host, 2, *command, "4000000")
    assert "--range" in refused(lab_host, 3, *command, "1")
    assert "VA:LENGTH" in refused(lab_host, 2, *command, "1", "--range", "here")
    assert "text:" in refused(lab_host, 2, *command, "1", "--scan", "words")


@pytest.mark.slow
@pytest.mark.parametrize("cmdline", ["no5lvl nokaslr", "no5lvl pti=on"])
def test_four_levels_with_large_leaves(lab_kernel: HostKernel, cmdline: str) -> None:
    with LabHost.start(lab_kernel, memory="6G", cmdline=f"{cmdline} memmap=256M$0x60000000") as host:
        exposed = audit(host, "anon", 1, scan=False)
        assert exposed["walk"]["levels"] == 4
        # The processor has 1 GiB pages, and 4 GiB of RAM in one piece are mapped by them.
        assert exposed["walk"]["direct_map_bytes"]["1G"] >= 1 << 30
        assert exposed["pages"]["direct_map_pages"] == PAGES
        assert exposed["walk"]["unreadable"] == []
        hidden = audit(host, "reserved", 0, scan=False)
        assert hidden["pages"]["pages_populated"] == PAGES
