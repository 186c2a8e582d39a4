"""What a disposable host is made of."""

import pytest

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
