"""What a disposable host is made of."""

import pytest

from offmap.lab.qemu import HostOptions, command_line


@pytest.mark.parametrize(("accel", "withheld"), [("tcg", True), ("kvm", False)])
def test_only_an_emulated_processor_is_without_fast_string_instructions(accel: str, withheld: bool) -> None:
    argv = command_line("qemu", "/vmlinuz", "/initrd", 3, HostOptions(1 << 30, accel=accel))
    cpu = argv[argv.index("-cpu") + 1].split(",")
    assert ("-erms" in cpu, "-fsrm" in cpu) == (withheld, withheld)
