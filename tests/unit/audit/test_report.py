"""An audit's result as JSON, and the command's arguments."""

import argparse
import json
from dataclasses import replace

import msgspec
import pytest

from offmap.audit.guest_ram import GuestRam, RamRange
from offmap.audit.judge import judge
from offmap.audit.kvm_list import Vm
from offmap.audit.kvm_vcpu import VCpu
from offmap.audit.looks import what_changed
from offmap.audit.result import Source
from offmap.audit.scan_result import FoundCanary, Place, Scan
from offmap.audit.verdict import Verdict
from offmap.cli.audit import add_parser, parse_range
from offmap.errors import ExitStatus, OffmapError
from offmap.report.typed import Address

from .report.samples import page_counts

RAM = GuestRam((RamRange(0x7F00_0000_0000, 100 * 4096, Source.MEMSLOT, 0, "anon"),))
HIDDEN = page_counts(ram_pages=100, pages_populated=100)
EXPOSED = page_counts(ram_pages=100, pages_populated=100, direct_map_pages=99, alias_pages=2, mapped_pages=100)


def scanned(in_guest: bool) -> Scan:
    region = "direct mapping of all physical memory"
    place = Place(va=Address(0xFFFF_8880_0000_1000), pa=Address(0x1000), region=region, in_guest=in_guest)
    return msgspec.structs.replace(CLEAN, canaries_found=1, found=(FoundCanary(1, (place,)),))


CLEAN = Scan(canaries_found=0, bytes_scanned=1 << 30, bytes_unread=4096, frames_unread=0, seconds=1.0, found=())


def test_canary_that_was_read_is_never_hidden() -> None:
    verdict, notes = judge(HIDDEN, RAM, scanned(in_guest=False))
    assert verdict is Verdict.EXPOSED
    assert any("copies" in note for note in notes)


def test_scan_that_could_not_read_a_page_of_memory_shows_nothing() -> None:
    assert judge(HIDDEN, RAM, CLEAN) == (Verdict.HIDDEN, ())
    verdict, (note,) = judge(HIDDEN, RAM, msgspec.structs.replace(CLEAN, frames_unread=1))
    assert verdict is Verdict.UNKNOWN and "1 mapped pages of memory were not scanned" in note
    # Registers and firmware's tables are mapped on each host.
    assert judge(HIDDEN, RAM, msgspec.structs.replace(CLEAN, device_pages=7)) == (Verdict.HIDDEN, ())


def kvm_says(*, intact: bool = True, runs: int = 0) -> Vm:
    return Vm(0x1000, 0x2000, "kvm-1", ((0x3000, 2),), (), intact, 0, 0, (VCpu(0, False, runs),), ())


def test_without_kvms_list_nothing_is_hidden_but_what_was_named() -> None:
    verdict, (note,) = judge(HIDDEN, GuestRam(RAM.ranges, unlisted="this kernel has no BTF"), None)
    assert verdict is Verdict.UNKNOWN and note.endswith("this kernel has no BTF")
    assert judge(EXPOSED, GuestRam(RAM.ranges, unlisted="no BTF"), None)[0] is Verdict.EXPOSED


def test_what_kvm_shows_speaks_against_hidden_whatever_the_walk_saw() -> None:
    verdict, (note,) = judge(HIDDEN, GuestRam(RAM.ranges, (kvm_says(runs=3),)), None)
    assert verdict is Verdict.UNKNOWN and "guests of its own (3 times)" in note
    verdict, notes = judge(HIDDEN, RAM, None, changed=["its slots were changed"])
    assert verdict is Verdict.UNKNOWN and notes == ("its slots were changed",)


def test_memory_that_the_guest_can_only_read_counts_if_it_could_write_to_it_before() -> None:
    part = RamRange(0x7F10_0000_0000, 4096, Source.KVM, 1 << 31)
    for intact, mapped, verdict in ((True, 1, Verdict.HIDDEN), (False, 0, Verdict.HIDDEN), (False, 1, Verdict.UNKNOWN)):
        ram = GuestRam(RAM.ranges, (kvm_says(intact=intact),), (part,))
        found, (note,) = judge(HIDDEN, ram, None, mapped_read_only=mapped)
        assert found is verdict and "cannot write to" in note


def test_pages_to_come_are_not_promised() -> None:
    some = page_counts(ram_pages=100, pages_populated=60, not_populated_pages=40)
    verdict, notes = judge(some, RAM, None)
    assert verdict is Verdict.HIDDEN and notes == (
        "40 pages are not populated: whether they will be hidden is known once they are",
    )
    assert judge(HIDDEN, RAM, None)[1] == ()


def test_part_of_an_audit_is_never_hidden() -> None:
    verdict, notes = judge(HIDDEN, RAM, None, partial="process 7 ended during the audit")
    assert (verdict, notes) == (Verdict.UNKNOWN, ())
    assert judge(EXPOSED, RAM, None, partial="process 7 ended during the audit")[0] is Verdict.EXPOSED


def test_why_it_was_guessed_is_said() -> None:
    guess = GuestRam((RamRange(0, 4096, Source.GUESS),), unlisted="this kernel has no BTF")
    (note,) = judge(HIDDEN, guess, None)[1]
    assert "guesses" in note
    assert "this kernel has no BTF" in note


def test_a_verdict_on_ranges_that_were_asked_for_says_so() -> None:
    (note,) = judge(HIDDEN, GuestRam((RamRange(0, 4096, Source.REQUESTED),)), None)[1]
    assert "only what --range names" in note


def test_slots_that_changed_are_never_hidden() -> None:
    changed = what_changed(RAM, (), 0, moved=True, made=False, named=False)
    assert judge(HIDDEN, RAM, None, changed=changed)[0] is Verdict.UNKNOWN
    assert judge(EXPOSED, RAM, None, changed=changed)[0] is Verdict.EXPOSED


def test_what_may_have_been_exchanged_when_the_auditor_came() -> None:
    vm = kvm_says(intact=False)
    for changed, since, made, named, words in (
        (vm, 1, False, False, []),
        (vm, 0, True, False, ["slots were changed", "may stand in for one that ended"]),
        (vm, 0, True, True, []),  # what was named is the same memory
        (replace(vm, invalidations=1), 1, False, False, ["KVM does not say when"]),
        (replace(vm, invalidations=1), 1, False, True, ["KVM does not say when"]),
    ):
        ram = GuestRam(RAM.ranges, (changed,))
        notes = what_changed(ram, (), since, moved=False, made=made, named=named)
        assert len(notes) == len(words) and all(word in note for word, note in zip(words, notes, strict=True)), notes


def test_json_has_the_words_of_the_design() -> None:
    data = scanned(in_guest=True).to_json()
    assert data["for"] == "canaries" and data["canaries_found"] == 1
    (found,) = json.loads(json.dumps(data))["found"]
    assert found["canary"] == 1 and found["places"][0]["in_guest"] is True
    assert found["places"][0]["va"] == "0xffff888000001000"


def test_range_argument() -> None:
    part = parse_range("0x7f0000000000:256M")
    assert (part.va, part.bytes, part.source) == (0x7F00_0000_0000, 256 << 20, Source.REQUESTED)


@pytest.mark.parametrize(
    "text", ["", "7f00", "x:1M", "0x1000:", "0x1001:4096", "0x1000:1", "0x1000:0", "-1000:4K", "f" * 17 + ":4K"]
)
def test_bad_range_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(OffmapError) as caught:
        parse_range(text)
    assert caught.value.exit_status is ExitStatus.FAILED and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--scan", "0123456789"], "text:"),
        (["--scan", "text:short"], "5 bytes"),
        (["--canary", "short"], "key"),
        (["--scan", "text:long enough", "--scan-threads", "0"], "threads"),
        (["--oracle", "drgn", "--oracle-sample", "0"], "sample"),
        (["--oracle", "drgn", "--oracle-sample", "5:x"], "sample"),
        (["--oracle-sample", "5"], "--oracle drgn"),
        (["--watch", "0"], "seconds"),
        (["--watch", "nan"], "seconds"),
        (["--watch", "1e11"], "seconds"),
    ],
)
def test_what_cannot_be_scanned_for_or_asked_is_refused(words: list[str], said: str) -> None:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["audit", "1", *words])
    with pytest.raises(OffmapError, match=said):
        args.run(args)
