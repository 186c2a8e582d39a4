"""Which flags of an unknown kernel are worth a try, and the backend's own option."""

import pytest

from offmap.errors import OffmapError
from offmap.memory.backend import parse_backend
from offmap.memory.guest_memfd_unmapped import GuestMemfdUnmapped, unknown_flags


@pytest.mark.parametrize(
    ("advertised", "flags"), [(0, []), (0b11, []), (0b111, [4]), (0b1011, [8]), (1 << 63 | 0b111, [4, 1 << 63])]
)
def test_only_flags_that_no_released_kernel_has_are_tried(advertised: int, flags: list[int]) -> None:
    assert list(unknown_flags(advertised)) == flags


def test_it_hides_and_may_be_aliased() -> None:
    backend = parse_backend("guest_memfd-unmapped,bit=3")
    assert isinstance(backend, GuestMemfdUnmapped)
    assert backend.bit == 3
    assert backend.hides
    assert backend.may_be_aliased
    assert isinstance(parse_backend("guest_memfd-unmapped"), GuestMemfdUnmapped)


@pytest.mark.parametrize("option", ["bit=1", "bit=64", "bit=", "bit=x", "bit=-3", "flag=4", "bit=²"])
def test_options_that_it_does_not_have(option: str) -> None:
    with pytest.raises(OffmapError, match=r"cannot be .*; its option is bit=N, a flag from 2 to 63"):
        parse_backend(f"guest_memfd-unmapped,{option}")
