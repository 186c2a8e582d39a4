"""What a disposable host is made of."""

from pathlib import Path

import pytest

from offmap.lab.host import LabHost
from offmap.lab.kernel import HostKernel

KERNEL = HostKernel("debian:6.12", "6.12.1", Path("/vmlinuz"), Path("/modules"))


@pytest.mark.parametrize(("accel", "cmdline"), [("tcg", "a=1 clearcpuid=erms"), ("kvm", "a=1")])
def test_what_is_for_an_emulated_processor_is_for_no_other(
    accel: str, cmdline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LabHost, "_boot", lambda self, timeout: None)
    with LabHost.start(KERNEL, cmdline="a=1", accel=accel, emulated_cmdline="clearcpuid=erms") as host:
        assert host.options.cmdline == cmdline
