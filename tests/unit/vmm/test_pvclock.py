"""kvm-clock on hidden memory: only where KVM itself says that it is safe."""

from pathlib import Path

import pytest

from offmap.boot.linux import BootSource
from offmap.errors import OffmapError
from offmap.hide import Vet
from offmap.memory.reserved import Reserved
from offmap.vmm import config, pvclock
from offmap.vmm.config import MachineConfig
from offmap.vmm.pvclock import is_safe_on_hidden_memory


class Answering:
    """A KVM with one answer."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __enter__(self) -> "Answering":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def check_extension(self, capability: int) -> int:
        assert capability == 252
        return self.value


@pytest.mark.parametrize(("value", "safe"), [(1, True), (0, False), (2, False)])
def test_nothing_but_a_clear_yes_counts(monkeypatch: pytest.MonkeyPatch, value: int, safe: bool) -> None:
    monkeypatch.setattr(pvclock, "Kvm", lambda: Answering(value))
    assert is_safe_on_hidden_memory("7.3.4-offmap-0123abcd") is safe


def test_another_kernels_capability_of_that_number_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pvclock, "Kvm", lambda: Answering(1))
    for release in ("7.5.1", "6.12.117+deb12-amd64", "7.3.4-myoffmap"):
        assert not is_safe_on_hidden_memory(release)


def test_a_host_without_kvm_is_not_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise OffmapError("there is no /dev/kvm")

    monkeypatch.setattr(pvclock, "Kvm", missing)
    assert not is_safe_on_hidden_memory("7.3.4-offmap-0123abcd")


@pytest.mark.parametrize("safe", [False, True])
def test_it_is_offered_only_when_asked_for_and_safe(monkeypatch: pytest.MonkeyPatch, safe: bool) -> None:
    monkeypatch.setattr(config, "is_safe_on_hidden_memory", lambda: safe)
    source = BootSource(Path("kernel"), None, "")
    assert not MachineConfig(source, Reserved(), 1 << 28, vetting=Vet()).offers_kvm_clock
    if safe:
        assert MachineConfig(source, Reserved(), 1 << 28, kvm_clock=True, vetting=Vet()).offers_kvm_clock
    else:
        with pytest.raises(OffmapError, match=r"kvm-clock cannot be offered on reserved memory"):
            MachineConfig(source, Reserved(), 1 << 28, kvm_clock=True, vetting=Vet())
