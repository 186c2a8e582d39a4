"""What a cell depends on, how many fit, and what a cluster's workers must be."""

from pathlib import Path

import pytest

from offmap.compare.capacity import CELL_MEMORY, available_memory, cells_at_a_time
from offmap.compare.cluster import WorkerFacts, unfit, worker_facts
from offmap.compare.inputs import code_digest, difference, inputs_of, kernel_digest, module_input
from offmap.compare.spec import NATIVE, CellSpec
from offmap.lab.kernel import HostKernel


def kernel(name: str, folder: Path) -> HostKernel:
    return HostKernel(name, "6.12.1-own", folder / "bzImage", folder / "modules")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "modules").mkdir()
    (tmp_path / "bzImage").write_bytes(b"image")
    (tmp_path / "modules/kvm.ko").write_bytes(b"module")
    return tmp_path


def test_a_kernel_of_ones_own_is_its_image_and_its_modules(files: Path) -> None:
    own = kernel(str(files / "bzImage"), files)
    first = kernel_digest(own)
    assert kernel_digest(own) == first
    (files / "modules/kvm.ko").write_bytes(b"another module")
    second = kernel_digest(own)
    (files / "bzImage").write_bytes(b"other")
    assert len({first, second, kernel_digest(own)}) == 3


def test_named_kernels_are_the_same_on_every_machine(files: Path) -> None:
    assert kernel_digest(kernel("patched:7.3", files)) == "6.12.1-own"
    debian = kernel_digest(kernel("debian:6.12", files))
    (files / "modules/kvm.ko").touch()
    assert kernel_digest(kernel("debian:6.12", files)) == debian
    assert kernel_digest(kernel(NATIVE, files / "nowhere"))


def test_inputs_name_what_changed(files: Path) -> None:
    now = inputs_of(kernel("debian:6.12", files), kernel("patched:7.3", files))
    assert now["code"] == code_digest()
    assert difference(now, now) == "" == difference({**now, "deadline": "5"}, now)
    assert difference({}, now) == "the code and the host kernel and the guest kernel"


def test_a_refusal_for_want_of_headers_holds_until_they_are_there(
    monkeypatch: pytest.MonkeyPatch, files: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("OFFMAP_CACHE", str(tmp_path_factory.mktemp("cache")))
    own = kernel(str(files / "bzImage"), files)
    before = module_input(CellSpec("unplugged"), own)
    (files / "modules/build").mkdir()
    (files / "modules/build/Makefile").touch()
    after = module_input(CellSpec("unplugged"), own)
    assert difference(before, after) == "what the offmap module needs"
    assert module_input(CellSpec("anon"), own) == {}


def test_memory_that_may_be_had() -> None:
    text = "MemTotal: 9 kB\nMemAvailable:    4096 kB\n"
    assert available_memory(text) == 4 << 20
    assert available_memory(text, "1048576\n") == 1 << 20
    assert available_memory(text, "max\n") == 4 << 20
    assert available_memory("") == 0
    assert cells_at_a_time() >= 1 and CELL_MEMORY > 1 << 30


def facts(reason: str = "", machine: str = "m", cells: int = 2) -> WorkerFacts:
    return WorkerFacts(reason, machine, cells)


def test_workers_that_will_do_and_that_will_not() -> None:
    threads = {"tcp://a": 1, "tcp://b": 1}
    assert unfit({"tcp://a": facts(), "tcp://b": facts()}, threads) == ""
    assert unfit({"tcp://a": facts(), "tcp://b": facts("no QEMU; install it")}, threads) == (
        "tcp://b cannot run cells: no QEMU; install it"
    )
    wrong = unfit({"tcp://a": ModuleNotFoundError("No module named 'offmap'\n…")}, threads)
    assert wrong == "tcp://a cannot run cells: it has no offmap that answers (No module named 'offmap')"
    both = {"tcp://a": facts(cells=1), "tcp://b": facts(cells=1)}
    assert "take 2 cells at a time, and it has processors and memory for 1" in unfit(both, threads)
    assert unfit({"tcp://a": facts(cells=1), "tcp://b": facts(cells=1, machine="n")}, threads) == ""


def test_a_worker_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch, files: Path) -> None:
    monkeypatch.setenv("OFFMAP_CACHE", str(files))
    monkeypatch.setattr("offmap.lab.qemu.find_qemu", lambda: "qemu")
    monkeypatch.setattr("offmap.lab.initramfs.busybox", lambda: b"")
    monkeypatch.setattr("offmap.compare.probes.guest_program.guest_program", lambda: b"")
    assert worker_facts(code_digest(), (str(files / "bzImage"),)).reason == ""
    assert worker_facts(code_digest(), ("/no/bzImage",)).reason.startswith("it has no /no/bzImage; ")
    monkeypatch.setattr("offmap.lab.apt.have_apt", lambda: False)
    assert worker_facts(code_digest(), ("debian:6.1",)).reason.startswith("it has no debian:6.1 in its cache, and no")
    (files / "kernels/debian-6.1/tree").mkdir(parents=True)
    assert worker_facts(code_digest(), ("debian:6.1",)).reason == ""
    assert worker_facts("other", ()).reason == "its offmap is not the one here; give it the same checkout"
