"""Device options of the command line, in their order."""

import argparse
from pathlib import Path

import pytest

from offmap.cli.devices import add_device_options, device_specs
from offmap.devices.virtio.drive import DriveSpec
from offmap.devices.virtio.rng import RngSpec
from offmap.errors import OffmapError


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_device_options(parser)
    return parser.parse_args(arguments)


def test_devices_keep_the_order_in_which_they_are_given() -> None:
    specs = device_specs(parse("--drive", "a", "--rng", "--drive=b,readonly=on"))
    first, rng, second = specs
    assert first == ("drive0", DriveSpec(Path("a")))
    assert second == ("drive1", DriveSpec(Path("b"), readonly=True))
    assert rng[0] == "rng0"
    assert isinstance(rng[1], RngSpec)


def test_no_devices_by_default() -> None:
    args = parse()
    assert device_specs(args) == []
    assert not args.virtio_mmio_cmdline


def test_abbreviations_are_what_argparse_makes_of_them() -> None:
    assert device_specs(parse("--dri", "a")) == [("drive0", DriveSpec(Path("a")))]


def test_what_cannot_be_is_an_error_of_ours() -> None:
    with pytest.raises(OffmapError, match="there is no option 'b=c'"):
        device_specs(parse("--drive", "a,b=c"))
