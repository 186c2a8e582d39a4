"""Which cells there are."""

import re
from collections import Counter

import msgspec
import pytest

from offmap.compare.kinds import kind_names
from offmap.compare.matrix import DEFAULT_AXES, FULL_AXES, cells_of, longest_first
from offmap.compare.spec import CellSpec
from offmap.errors import OffmapError
from offmap.memory.backend import BACKENDS as RAM

BACKENDS = kind_names()


def test_every_kind_of_ram_is_compared() -> None:
    foreign = {"qemu-unplugged", "libvirt-pool", "firecracker-anon", "firecracker-unplugged"}
    assert set(BACKENDS) == {*(name for name, kind in RAM.items() if kind.compared), *foreign}
    assert [spec.backend for spec in cells_of(DEFAULT_AXES)] == list(BACKENDS)
    assert {(s.host_kernel, s.guest_kernel, s.vcpus, s.kvm_clock) for s in cells_of(DEFAULT_AXES)} == {
        ("debian:6.12", "debian:6.12", 1, "auto")
    }


def test_keys_are_file_names_and_differ() -> None:
    cells = {*cells_of(FULL_AXES), *cells_of(DEFAULT_AXES)}
    for one in ("/a/bzImage", "/b/bzImage", "/a/bz Image", "/a/bz-Image", "/a/debian-6.12", "running", "native"):
        cells |= {CellSpec("anon", one), CellSpec("anon", "debian:6.12", one)}
    assert len({cell.key for cell in cells}) == len(cells)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,200}", cell.key) for cell in cells)
    assert CellSpec("anon").key == "anon_on-debian-6.12_guest-debian-6.12_1vcpu_clock-auto"  # kept in people's folders


def test_the_full_matrix_has_each_combination_or_one_that_stands_for_it() -> None:
    cells = cells_of(FULL_AXES)
    assert len(set(cells)) == len(cells)
    assert {(c.backend, c.host_kernel) for c in cells} == {(b, h) for b in BACKENDS for h in FULL_AXES.host_kernels}
    counts = Counter((c.backend, c.host_kernel) for c in cells)
    assert counts["anon", "debian:7.3"] == 3 * 2 * 2
    assert counts["secretmem", "debian:6.12"] == 1  # refused, whatever the guest
    assert counts["secretmem", "patched:7.3"] == 12
    assert counts["guest_memfd", "debian:7.3"] == 12
    # kvm-clock on hidden memory is refused on kernels as released; with QEMU it is not
    assert counts["unplugged", "debian:6.1"] == 3 * 2 + 1
    assert counts["qemu-unplugged", "debian:6.1"] == counts["libvirt-pool", "debian:6.1"] == 12
    assert counts["firecracker-unplugged", "debian:6.1"] == 3 * 2 + 1


def test_what_says_most_comes_first() -> None:
    cells = cells_of(FULL_AXES)
    assert [cell.backend for cell in cells[: len(BACKENDS)]] == list(BACKENDS)
    assert {cell.guest_kernel for cell in cells[:100]} == {"debian:6.12"}


def test_a_kernel_of_ones_own_beside_debians() -> None:
    cells = cells_of(DEFAULT_AXES.narrowed(host_kernels=["/k/bzImage", "debian:6.12", "/k/bzImage"]))
    assert len(cells) == 2 * len(BACKENDS)
    assert [cell.host_kernel for cell in cells[: len(BACKENDS)]] == ["/k/bzImage"] * len(BACKENDS)


def test_axes_that_cannot_be() -> None:
    with pytest.raises(OffmapError, match="'ram' is no kind of guest RAM"):
        DEFAULT_AXES.narrowed(backends=["ram"])
    with pytest.raises(OffmapError, match="'firecracker-memfd' is no kind of guest RAM"):
        DEFAULT_AXES.narrowed(backends=["firecracker-memfd"])
    with pytest.raises(OffmapError, match="0 vCPUs"):
        DEFAULT_AXES.narrowed(vcpus=[0])
    with pytest.raises(OffmapError, match="kvm-clock cannot be 'maybe'"):
        DEFAULT_AXES.narrowed(kvm_clocks=["maybe"])


def test_specs_go_through_json() -> None:
    for spec in cells_of(FULL_AXES):
        assert msgspec.convert(msgspec.to_builtins(spec), CellSpec) == spec
    good = msgspec.to_builtins(CellSpec("anon"))
    for changes in ({"vcpus": "2"}, {"vcpus": 0}, {"kvm_clock": "maybe"}, {"backend": None}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            msgspec.convert(good | changes, CellSpec)
    with pytest.raises(ValueError, match="backend"):
        msgspec.convert({"host_kernel": "debian:6.12"}, CellSpec)


def test_no_long_cell_is_left_for_the_end() -> None:
    cells = cells_of(DEFAULT_AXES.narrowed(host_kernels=["debian:6.12", "patched:7.3"]))
    run = longest_first(cells)
    assert sorted(run) == sorted(cells)
    assert [cell.host_kernel for cell in run] == [cell.host_kernel for cell in cells]  # a setting after the other
    kinds = [cell.backend for cell in run]
    assert kinds[:2] == ["secretmem-bridge", "qemu-unplugged"]
    assert kinds[10:13] == ["secretmem", "guest_memfd", "guest_memfd-unmapped"]  # refused on 6.12
    assert kinds[13:16] == ["secretmem-bridge", "secretmem", "guest_memfd-unmapped"]  # and not there
