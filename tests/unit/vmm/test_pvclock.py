"""kvm-clock on hidden memory: only where KVM itself says that it is safe."""

from pathlib import Path

import pytest

from offmap.boot.linux import BootSource
from offmap.errors import OffmapError
from offmap.hide import Vet
from offmap.memory.reserved import Reserved
from offmap.vmm import config
from offmap.vmm.config import MachineConfig
from offmap.vmm.pvclock import is_safe_on_hidden_memory


@pytest.mark.parametrize(("text", "safe"), [("Y\n", True), ("N\n", False), ("", False), ("1\n", False), ("Y", False)])
def test_nothing_but_a_clear_yes_counts(tmp_path: Path, text: str, safe: bool) -> None:
    (tmp_path / "parameter").write_text(text)
    assert is_safe_on_hidden_memory(tmp_path / "parameter") is safe


def test_a_kernel_that_does_not_say_is_not_safe(tmp_path: Path) -> None:
    assert not is_safe_on_hidden_memory(tmp_path / "none")
    assert not is_safe_on_hidden_memory(tmp_path)


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
