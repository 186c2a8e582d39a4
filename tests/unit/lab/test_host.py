"""What a disposable host is made of."""

from pathlib import Path

import pytest

from offmap.lab import accel
from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel
from offmap.lab.qemu import HostOptions, command_line


@pytest.mark.parametrize(("accel", "withheld"), [("tcg", True), ("icount", True), ("kvm", False)])
def test_only_an_emulated_processor_is_without_fast_string_instructions(accel: str, withheld: bool) -> None:
    argv = command_line("qemu", "/vmlinuz", "/initrd", 3, HostOptions(1 << 30, accel=accel))
    cpu = argv[argv.index("-cpu") + 1].split(",")
    assert ("-erms" in cpu, "-fsrm" in cpu) == (withheld, withheld)


def test_a_clock_of_instructions_ticks_as_its_kernel_is_told() -> None:
    argv = command_line("qemu", "/vmlinuz", "/initrd", 3, HostOptions(1 << 30, accel="icount"))
    assert argv[argv.index("-icount") + 1] == "shift=0"  # 2^0 ns each
    assert "tsc_early_khz=1000000" in argv[argv.index("-append") + 1].split()


def test_a_qemu_that_ends_at_once_has_no_kvm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    qemu = tmp_path / "qemu"
    qemu.write_text("#!/bin/sh\necho 'qemu-system-x86_64: kvm_buf_set_msrs: Assertion failed.' >&2\nexit 134\n")
    qemu.chmod(0o755)
    monkeypatch.setattr("offmap.lab.process.find_qemu", lambda: str(qemu))
    monkeypatch.setattr("offmap.lab.host.initramfs", lambda _: type("Archive", (), {"archive": lambda _: b""})())
    monkeypatch.setattr(accel, "SIGN_OF_LIFE_SECONDS", 1e6)  # without the mend this test does not end
    assert not LabHost._works_under_kvm(HostKernel("k", "7.3", tmp_path / "vmlinuz", tmp_path))
