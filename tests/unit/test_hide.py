"""RAM that promises to be hidden: nobody builds a guest on it without a word on its audit, and no page goes unseen."""

import copy
import json
import mmap
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from offmap.boot.linux import BootSource
from offmap.errors import BackendRefused
from offmap.hide import NotAudited, Ram, Vet, Vetted, _vetting, vet
from offmap.kvm import Vm
from offmap.memory.backend import BACKENDS
from offmap.memory.backing import Backing
from offmap.memory.guest import GuestMemory
from offmap.memory.iomem import PhysicalRange
from offmap.memory.secretmem import Secretmem
from offmap.vmm.config import MachineConfig

PAGES = 100
SEEN = {"pages": PAGES, "direct": 0, "mapped_pages": 0, "unseen": 0, "why": "", "mapped": []}
ALIASED: dict[str, Any] = {"mapped_pages": 2, "mapped": [[0x200000, 8192]]}
HIDING = [name for name, backend in BACKENDS.items() if backend.hides]
NO_VM = Vm.__new__(Vm)


def vetted(monkeypatch: pytest.MonkeyPatch, status: int = 0, **seen: Any) -> Vetted:
    """What `vet` makes of what its audit says."""

    def run(argv: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(argv, status, json.dumps(SEEN | seen), "so it\nis not known why\n")

    monkeypatch.setattr(subprocess, "run", run)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with GuestMemory([Backing("test", -1, PAGES * 4096, flags=flags)]) as memory:
        return vet(Secretmem(), memory)


def test_hidden_ram_is_the_guests(monkeypatch: pytest.MonkeyPatch) -> None:
    found = vetted(monkeypatch)
    assert (found.pages, found.excluded) == (PAGES, ())


def test_aliased_pages_are_kept_back(monkeypatch: pytest.MonkeyPatch) -> None:
    assert vetted(monkeypatch, **ALIASED).excluded == (PhysicalRange(0x200000, 0x202000),)


@contextmanager
def ram_and_audits(monkeypatch: pytest.MonkeyPatch, mib: int, said: list[list[int]]) -> Iterator[GuestMemory]:
    """RAM whose MiB begin with their numbers, and audits that find these addresses aliased, one after the other."""

    def run(argv: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        mapped = [[address, 4096] for address in said.pop(0)]
        seen = SEEN | {"pages": mib << 8, "mapped_pages": len(mapped), "mapped": mapped}
        return subprocess.CompletedProcess(argv, 0, json.dumps(seen), "")

    monkeypatch.setattr(subprocess, "run", run)
    fd = os.memfd_create("ram")
    os.ftruncate(fd, mib << 20)
    with GuestMemory([Backing("test", fd, mib << 20)]) as memory:
        os.close(fd)
        for at in range(mib):
            memory.write(at << 20, bytes([at]) * (1 << 20))
        yield memory


@pytest.mark.parametrize("clean", [2, None])
def test_a_page_of_the_first_mib_has_its_guest_get_another_mib(
    monkeypatch: pytest.MonkeyPatch, clean: int | None
) -> None:
    first, *others = (at << 20 | 0x5000 for at in range(4) if at != clean)
    said = [[first, *others], others[:1]]
    with ram_and_audits(monkeypatch, 4, said) as memory:
        found = _vetting(Secretmem(), memory, Vet(), lambda _: None)
        assert isinstance(found, Vetted)
        order = [0, 1, 2, 3] if clean is None else [2, 1, 0, 3]
        assert all(memory.read(at << 20, 1 << 20) == bytes([which]) * (1 << 20) for at, which in enumerate(order))
    # It is seen once more where its guest has it now.
    assert len(said) == (1 if clean is None else 0)
    assert found.excluded[0].start == (0x5000 if clean is None else 0x105000)


def test_mibs_with_aliased_pages_lie_behind_those_where_the_kernel_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    said = [[at << 20 for at in each] for each in ([0, 1, 17, 18], [16, 17, 18, 19])]
    with ram_and_audits(monkeypatch, 20, said) as memory:
        _vetting(Secretmem(), memory, Vet(), lambda _: None)
        assert [memory.read(at << 20, 1)[0] for at in range(20)] == [19, 16, *range(2, 16), 1, 17, 18, 0]
    assert not said


@pytest.mark.parametrize(
    ("status", "seen", "message"),
    [
        (0, {"direct": 1}, "1 of 100 pages are in its direct map"),
        # An alias beside them makes the verdict "exposed", whatever could not be seen.
        (0, ALIASED | {"unseen": 7, "why": "its level 2 entry kept changing"}, "7 of .*kept changing"),
        (0, {"unseen": 3}, "3 of 100 pages .*not populated"),
        (0, {"pages": 99}, "1 of 100 pages could not be audited"),
        (0, ALIASED | {"mapped_pages": 3}, "could not be audited"),  # one of them has no guest-physical address
        (1, {}, "cannot be found and kept from the guest: is not known why"),
        (-9, {}, "cannot be found and kept from the guest: is not known why"),
    ],
)
def test_what_was_not_seen_is_refused(
    monkeypatch: pytest.MonkeyPatch, status: int, seen: dict[str, Any], message: str
) -> None:
    with pytest.raises(BackendRefused, match=message):
        vetted(monkeypatch, status, **seen)


def test_the_audit_is_another_process_and_says_why_it_cannot() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "offmap.hide"],
        input=f"[{1 << 30}, [[0, 4096, 0]]]",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1


def test_only_an_audit_makes_ram_vetted(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="only an audit"):
        Vetted()
    found = vetted(monkeypatch, **ALIASED)
    with pytest.raises(AttributeError):
        found.excluded = ()
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError):
            attempt(found)


@pytest.mark.parametrize("name", HIDING)
def test_who_says_nothing_of_the_audit_builds_no_machine(name: str) -> None:
    backend = BACKENDS[name]()
    source = BootSource(Path("kernel"), None, "")
    with pytest.raises(TypeError, match="vetting"):
        MachineConfig(source, backend, 1 << 28)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="vetting"):
        Ram(backend, NO_VM, 1 << 28)  # type: ignore[call-arg]

    class Unseen(Vet):  # type: ignore[misc]
        pass

    for said in (None, (), lambda: (), Vet, Unseen(), PhysicalRange(0, 4096)):
        with pytest.raises(TypeError, match="needs a word on its audit"):
            Ram(backend, NO_VM, 1 << 28, said, print)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="needs a word on its audit"):
            MachineConfig(source, backend, 1 << 28, vetting=said)  # type: ignore[arg-type]
    for reason in ("", " \n"):
        with pytest.raises(ValueError, match="needs a reason"):
            NotAudited(reason)


def test_the_audit_is_not_imported_before_it_is_needed() -> None:
    program = "import sys, offmap.vmm.machine; print(*(m for m in sys.modules if m.startswith('offmap.audit')))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
