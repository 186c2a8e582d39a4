"""What this machine adds to a guest's command line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offmap.vmm.command_line import with_hvc0, with_machine_parameters


@pytest.mark.parametrize(
    ("given_", "tsc_khz", "result"),
    [
        ("", None, "pci=off"),
        ("console=ttyS0", None, "console=ttyS0 pci=off"),
        ("console=ttyS0", 2400000, "console=ttyS0 pci=off tsc_early_khz=2400000 tsc=reliable"),
        ("pci=realloc", None, "pci=realloc"),
        ("tsc=nowatchdog pci=off", 1, "tsc=nowatchdog pci=off tsc_early_khz=1"),
        ("tsc_early_khz=5", 1, "tsc_early_khz=5 pci=off tsc=reliable"),
        ("xpci=1 pcix=2", None, "xpci=1 pcix=2 pci=off"),
    ],
)
def test_parameters_are_added_unless_they_were_given(given_: str, tsc_khz: int | None, result: str) -> None:
    assert with_machine_parameters(given_, tsc_khz) == result


def test_what_is_for_init_stays_for_init() -> None:
    # admin-guide/kernel-parameters: what follows "--" is passed to init, so ours must stand before it.
    assert with_machine_parameters("quiet -- single", None) == "quiet pci=off -- single"
    assert with_machine_parameters("-- pci=on", None) == "pci=off -- pci=on"


@given(st.text("abc=, -", max_size=40), st.one_of(st.none(), st.integers(1, 10_000_000)))
def test_what_was_given_stays_in_its_order(given_: str, tsc_khz: int | None) -> None:
    words = with_machine_parameters(given_, tsc_khz).split()
    rest = iter(words)
    assert all(word in rest for word in given_.split())
    assert with_machine_parameters(" ".join(words), tsc_khz).split() == words


def test_what_may_come_more_than_once_is_added_to_what_the_user_gave() -> None:
    more = ["virtio_mmio.device=4K@0xd0000000:5", "virtio_mmio.device=4K@0xd0001000:6"]
    line = with_machine_parameters("virtio_mmio.device=1K@0xe0000000:20 -- quiet", None, more)
    assert line == f"virtio_mmio.device=1K@0xe0000000:20 pci=off {more[0]} {more[1]} -- quiet"


@pytest.mark.parametrize(
    ("given_", "result"),
    [
        ("", "console=hvc0"),
        ("quiet", "quiet console=hvc0"),
        ("root=/dev/vda console=ttyS0 quiet", "root=/dev/vda console=ttyS0 console=hvc0 quiet"),
        ("console=ttyS0 quiet console=ttyS1,9600", "console=ttyS0 quiet console=ttyS1,9600 console=hvc0"),
        ("console=hvc0 console=ttyS0", "console=hvc0 console=ttyS0"),
        ("quiet -- console=hvc0", "quiet console=hvc0 -- console=hvc0"),
    ],
)
def test_hvc0_is_the_last_console_unless_it_was_given(given_: str, result: str) -> None:
    assert with_hvc0(given_) == result
