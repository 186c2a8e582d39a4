"""What an audit saw of KVM's counts, and what it tells the next one."""

from dataclasses import replace
from pathlib import Path

import pytest

from offmap.audit.kvm_list import Vm
from offmap.audit.seen import Seen, exchanged, seen_at
from offmap.errors import OffmapError

VM = Vm(0xFFFF_C900_0000_0000, 0xFFFF_8880_0000_1000, "kvm-42", (), (), True, 0, 5, (), (), made=100)


def test_memory_that_was_never_exchanged_needs_no_earlier_audit() -> None:
    assert not exchanged([replace(VM, invalidations=0)], ())
    assert exchanged([replace(VM, invalidations=0), VM], ())


def test_what_an_earlier_audit_saw_counts_for_the_same_vm_and_the_same_count_only() -> None:
    seen = seen_at(200, [VM])
    assert not exchanged([VM], seen)
    for other in (
        replace(VM, invalidations=7),
        replace(VM, address=VM.address + 4096),
        replace(VM, memory=VM.memory + 4096),
        replace(VM, label="kvm-43"),
        replace(VM, made=201),  # at the same place, by the same thread, but later
        replace(VM, made=None, changed=201),
    ):
        assert exchanged([other], seen), other
        assert exchanged([VM, other], seen)


def test_of_a_vm_that_was_read_twice_the_last_count_is_kept() -> None:
    (only,) = seen_at(200, [VM, replace(VM, invalidations=7)])
    assert only.invalidations == 7


def test_a_file_is_kept_for_the_next_audit_of_this_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "seen.json"
    seen = Seen(path)
    assert seen.vms == () and not path.exists()
    seen.keep(seen_at(200, [VM]))
    assert path.stat().st_mode & 0o777 == 0o600
    assert Seen(path).vms == seen.vms == seen_at(200, [VM])
    monkeypatch.setattr("offmap.audit.seen._boot_id", lambda: "another")
    assert Seen(path).vms == ()


@pytest.mark.parametrize("text", ["", "[]", '{"schema": "offmap-seen/1"}', '{"schema": "offmap-seen/2"}'])
def test_another_file_is_refused_and_left_as_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "seen.json"
    path.write_text(text)
    with pytest.raises(OffmapError, match="is not what an audit kept") as error:
        assert not Seen(path).vms
    assert "\n" not in str(error.value) and path.read_text() == text


def test_a_folder_that_cannot_be_written_is_told_before_the_audit(tmp_path: Path) -> None:
    with pytest.raises(OffmapError, match="nowhere"):
        assert not Seen(tmp_path / "nowhere" / "seen.json").vms


def test_without_a_file_it_is_kept_in_memory() -> None:
    seen = Seen(None)
    assert seen.vms == ()
    seen.keep(seen_at(200, [VM]))
    assert len(seen.vms) == 1
