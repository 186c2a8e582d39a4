"""VMMs that try to be called hidden: each ends in exposed or undetermined, and honest ones beside them stay hidden."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from offmap.lab.host import LabHost
from offmap.lab.provision import host_kernel
from offmap.patience import scaled

from .conftest import keep_still, soak, words_for

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
TARGET = str(Path(__file__).with_name("kvm_attack_target.py"))
PATIENCE = 480.0  # seconds, to be scaled, for what takes 120 beside another test

Found = dict[str, Any]

HONEST = ("nothing", "small_and_always_read_only")
EXPOSED = (
    "thread_with_descriptors_of_its_own",
    "duplicate_of_the_decoy",
    "descriptors_closed_while_it_runs",
    "child_with_the_same_memory",
    "descriptor_on_its_way_in_a_socket",
    "vcpu_mapped_and_closed",
    "slot_of_system_management_mode_only",
)
UNDETERMINED = ("read_only_since_the_auditor_may_come", "read_only_and_as_large_as_ram", "nested_guest_allowed")


def ask(host: LabHost, *names: str) -> Found:
    done = host.output([sys.executable, TARGET, *names], timeout=scaled(PATIENCE))
    assert done.status == 0, done.stderr.decode()
    found: Found = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def found(lab_host: LabHost) -> Iterator[Found]:
    """Give what all of them found: one process runs them, as each start of Python takes seconds there."""
    more = (
        "program_replaced_and_descriptor_kept",
        "clock_page_in_hidden_memory",
        "page_with_an_alias_that_is_said_to_be_kept_from_the_guest",
        "moved_under_the_slot",
    )
    yield ask(lab_host, *HONEST, *EXPOSED, *UNDETERMINED, *more, "swapped", "born", "handed_over", "churn")


@pytest.mark.parametrize("name", HONEST)
def test_honest_vms_are_hidden(found: Found, name: str) -> None:
    assert (found[name]["verdict"], found[name]["all"], found[name]["all notes"]) == ("hidden", 0, []), found[name]
    assert found[name]["range"]["verdict"] == "hidden", found[name]


@pytest.mark.parametrize("name", EXPOSED)
def test_a_vm_that_descriptors_do_not_show_is_found(found: Found, name: str) -> None:
    assert (found[name]["verdict"], found[name]["all"]) == ("exposed", 1), found[name]


@pytest.mark.parametrize("name", UNDETERMINED)
def test_what_may_be_or_may_become_exposed_is_not_hidden(found: Found, name: str) -> None:
    assert (found[name]["verdict"], found[name]["all"]) == ("unknown", 3), found[name]
    assert any("cannot write to" in note or "guests of its own" in note for note in found[name]["notes"])


def test_what_kvm_says_against_a_vm_counts_for_the_range_that_is_its_memory_too(found: Found) -> None:
    result = found["nested_guest_allowed"]["range"]
    assert result["verdict"] == "unknown" and any("guests of its own" in note for note in result["notes"]), result


def test_a_page_that_kvm_maps_for_its_clock_is_told_by_kvm_too(found: Found) -> None:
    result = found["clock_page_in_hidden_memory"]
    assert result["verdict"] == "exposed"
    assert any("kernel mapping of the guest's page at 0x2000" in note for note in result["notes"]), result


def test_a_claim_excuses_no_page_that_is_in_a_slot(found: Found) -> None:
    result = found["page_with_an_alias_that_is_said_to_be_kept_from_the_guest"]
    assert (result["verdict"], result["all"]) == ("exposed", 1), result
    assert any("1 pages that the VMM says it keeps from its guest count" in note for note in result["notes"]), result


def test_what_was_exchanged_when_the_auditor_came_is_not_hidden(found: Found) -> None:
    assert found["swapped"]["status"] == 3, found["swapped"]
    for what, words in {
        "SLOT": "since the audit was started",
        "VM": "may stand in for one that ended",
        "MEMORY": "KVM does not say when",
    }.items():
        verdict, *notes = found["swapped"]["found"][what]
        assert verdict == "unknown" and any(words in note for note in notes), found["swapped"]


def test_a_vm_that_was_just_made_is_judged_if_it_can_stand_in_for_no_other(found: Found) -> None:
    assert found["born"]["alone"] == {"verdict": "hidden", "notes": []}, found["born"]
    result = found["born"]["another ended"]
    assert result["verdict"] == "unknown" and "may stand in for one that ended" in result["notes"][0], result


def test_a_vm_is_judged_though_its_process_ends_and_one_with_the_same_memory_goes_on(found: Found) -> None:
    assert found["handed_over"] == {"all": 1, "pids": [True]}


def test_memory_that_was_changed_under_a_slot_meanwhile_is_not_hidden(found: Found) -> None:
    result = found["moved_under_the_slot"]
    assert result["verdict"] == "unknown", result
    assert any("or the memory under them" in note for note in result["notes"])
    # It may have been so before; an audit that saw it before tells that it was not.
    assert [each["verdict"] for each in result["later"]] == ["unknown", "hidden"], result


def test_a_vm_without_a_process_is_told_and_others_are_judged(found: Found) -> None:
    result = found["program_replaced_and_descriptor_kept"]
    assert (result["verdict"], result["all"]) == ("hidden", 3), result
    assert any("no process is found for" in note for note in result["all notes"])


def test_honest_vms_stay_hidden_while_others_begin_and_end(found: Found) -> None:
    assert set(found["churn"]["verdicts"]) == {"hidden"}, found["churn"]
    for status, notes, reasons, verdicts in found["churn"]["every"]:
        # The VMs that come and go are of ordinary memory: one may have been there to be seen.
        assert (status in {0, 1}, notes, reasons, verdicts) == (True, [], [], ["hidden", "hidden"]), found["churn"]


def test_more_programs_of_each_kind(lab_host: LabHost) -> None:
    """All beside each other, in one audit; the honest one among them is hidden."""
    done = lab_host.output([sys.executable, "-m", "tests.lab.nine_ways"], timeout=scaled(PATIENCE), cwd=ROOT)
    assert done.status == 0, (done.stdout.decode(), done.stderr.decode())


@pytest.mark.slow
@pytest.mark.parametrize("series", [soak("6.1"), "7.3"])
def test_other_kernels(series: str, tmp_path: Path) -> None:
    kernel = host_kernel(f"debian:{series}")
    with LabHost.start(kernel, memory="2G", cmdline=words_for(kernel), out=tmp_path) as host:
        keep_still(host)
        newer = ("guest_memfd_held_by_another",) if series == "7.3" else ()
        found = ask(host, *HONEST, *EXPOSED, *UNDETERMINED, *newer, "swapped", "born", "churn")
    for name in HONEST:
        test_honest_vms_are_hidden(found, name)
    for name in (*EXPOSED, *newer):
        test_a_vm_that_descriptors_do_not_show_is_found(found, name)
    for name in UNDETERMINED:
        test_what_may_be_or_may_become_exposed_is_not_hidden(found, name)
    test_what_was_exchanged_when_the_auditor_came_is_not_hidden(found)
    test_a_vm_that_was_just_made_is_judged_if_it_can_stand_in_for_no_other(found)
    test_honest_vms_stay_hidden_while_others_begin_and_end(found)
