"""The whole of a Linux guest in memory: boot_params, command line, initrd, ACPI tables, E820."""

import mmap
import os
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from offmap.boot.acpi import build_tables
from offmap.boot.kernel_image import check_kernel
from offmap.boot.linux import BOOT_PARAMS, BootSource, load_linux
from offmap.boot.reset_vector import RESET_CODE, RESET_VECTOR
from offmap.errors import OffmapError
from offmap.memory.backing import Backing
from offmap.memory.guest import GuestMemory
from offmap.memory.iomem import PhysicalRange
from offmap.uapi import bootparam as bp
from offmap.uapi.mman import MAP_NORESERVE

from .synthetic_kernel import CODE, EHDR, MIB, bzimage, vmlinux

PAGE = 4096
RAM = 64 * MIB
INITRD = b"070701" + os.urandom(3 * PAGE)
ACPI = build_tables(2)


def guest(size: int = RAM) -> GuestMemory:
    return GuestMemory([Backing("test", -1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)])


class Params:
    """The zero page as a kernel reads it."""

    def __init__(self, memory: GuestMemory) -> None:
        self.page = memory.read(BOOT_PARAMS, bp.BOOT_PARAMS_SIZE)

    def u32(self, offset: int) -> int:
        return int(struct.unpack_from("<I", self.page, offset)[0])

    def e820(self) -> list[tuple[int, int, int]]:
        count = self.page[bp.E820_ENTRIES]
        return [struct.unpack_from(bp.E820_ENTRY_FORMAT, self.page, bp.E820_TABLE + 20 * n) for n in range(count)]


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., BootSource]:
    """Give a function that makes the files of a guest."""

    def make(
        kernel: bytes | None = None, initrd: bytes | None = INITRD, command_line: str = "console=ttyS0"
    ) -> BootSource:
        (tmp_path / "kernel").write_bytes(bzimage() if kernel is None else kernel)
        if initrd is not None:
            (tmp_path / "initrd").write_bytes(initrd)
        return BootSource(tmp_path / "kernel", None if initrd is None else tmp_path / "initrd", command_line)

    return make


@pytest.mark.parametrize("kernel", [bzimage(), vmlinux()], ids=["bzImage", "vmlinux"])
def test_a_guest_in_memory(source: Callable[..., BootSource], kernel: bytes) -> None:
    is_elf = kernel.startswith(b"\x7fELF")
    with guest() as memory:
        entry = load_linux(source(kernel), memory, ACPI)
        params = Params(memory)
        assert entry == (EHDR.e_entry if is_elf else 16 * MIB + 0x200)
        assert params.page[bp.HEADER : bp.HEADER + 4] == b"HdrS"
        assert params.page[bp.TYPE_OF_LOADER] == 0xFF
        assert params.page[bp.LOADFLAGS] & bp.LOADED_HIGH
        command_line = memory.read(params.u32(bp.CMD_LINE_PTR), 14)
        assert command_line == b"console=ttyS0\0"
        assert (params.u32(bp.EXT_CMD_LINE_PTR), params.u32(bp.EXT_RAMDISK_IMAGE)) == (0, 0)
        address, size = params.u32(bp.RAMDISK_IMAGE), params.u32(bp.RAMDISK_SIZE)
        assert memory.read(address, size) == INITRD
        assert address % PAGE == 0
        (rsdp,) = struct.unpack_from("<Q", params.page, bp.ACPI_RSDP_ADDR)
        assert memory.read(rsdp, 8) == b"RSD PTR "
        assert memory.read(ACPI.rsdp_address, len(ACPI.blob)) == ACPI.blob
        assert memory.read(RESET_VECTOR, len(RESET_CODE)) == RESET_CODE
        assert ACPI.rsdp_address + len(ACPI.blob) <= RESET_VECTOR
        if not is_elf:
            assert params.page[bp.SETUP_SECTS] == 3
            assert memory.read(16 * MIB, len(CODE)) == CODE


def test_excluded_pages_stay_as_they_are_and_are_reserved(source: Callable[..., BootSource]) -> None:
    # Where the kernel and the initrd would go, and single pages elsewhere.
    excluded = [
        PhysicalRange(16 * MIB, 16 * MIB + PAGE),
        PhysicalRange(RAM - PAGE, RAM),
        PhysicalRange(RAM - 3 * PAGE, RAM - 2 * PAGE),
        PhysicalRange(30 * MIB, 31 * MIB),
    ]
    mark = b"\xee" * PAGE
    with guest() as memory:
        for r in excluded:
            for address in range(r.start, r.end, PAGE):
                memory.write(address, mark)
        entry = load_linux(source(), memory, ACPI, excluded)
        for r in excluded:
            assert all(memory.read(address, PAGE) == mark for address in range(r.start, r.end, PAGE))
            assert not r.start <= entry < r.end
        entries = Params(memory).e820()
    reserved = [(start, start + size) for start, size, kind in entries if kind == bp.E820_RESERVED]
    assert reserved == sorted((r.start, r.end) for r in excluded)
    assert all(start + size <= after for (start, size, _), (after, _, _) in pairwise(entries))


def test_e820_goes_around_the_hole_below_4_gib(source: Callable[..., BootSource]) -> None:
    with guest((3 << 30) + 512 * MIB) as memory:
        load_linux(source(), memory, ACPI)
        params = Params(memory)
        assert params.e820()[-2:] == [
            (MIB, (3 << 30) - MIB, bp.E820_RAM),
            (4 << 30, 512 * MIB, bp.E820_RAM),
        ]
        assert params.u32(bp.RAMDISK_IMAGE) + len(INITRD) <= 1 << 31, "initrd_addr_max"


def test_initrd_goes_below_the_kernels_limit(source: Callable[..., BootSource]) -> None:
    with guest() as memory:
        load_linux(source(bzimage({bp.INITRD_ADDR_MAX: 40 * MIB - 1})), memory, ACPI)
        address = Params(memory).u32(bp.RAMDISK_IMAGE)
        assert 36 * MIB < address <= 40 * MIB - len(INITRD)


def test_no_initrd(source: Callable[..., BootSource]) -> None:
    with guest() as memory:
        load_linux(source(initrd=None), memory, ACPI)
        params = Params(memory)
        assert (params.u32(bp.RAMDISK_IMAGE), params.u32(bp.RAMDISK_SIZE)) == (0, 0)


@pytest.mark.parametrize(("cmdline_size", "room"), [(2047, 2047), (255, 255), (0, 255), (0xFFFFFFFF, 2047)])
def test_longest_command_line(source: Callable[..., BootSource], cmdline_size: int, room: int) -> None:
    kernel = bzimage({bp.CMDLINE_SIZE: cmdline_size})
    with guest() as memory:
        load_linux(source(kernel, command_line="x" * room), memory, ACPI)
        assert memory.read(Params(memory).u32(bp.CMD_LINE_PTR), room + 1) == b"x" * room + b"\0"
        with pytest.raises(OffmapError, match=f"has {room + 1} bytes and this kernel takes {room}; shorten"):
            load_linux(source(kernel, command_line="x" * (room + 1)), memory, ACPI)


def test_a_command_line_in_any_encoding_is_passed_on(source: Callable[..., BootSource]) -> None:
    with guest() as memory:
        load_linux(source(command_line="name=é " + os.fsdecode(b"raw=\xff")), memory, ACPI)
        expected = "name=é ".encode() + b"raw=\xff\0"
        assert memory.read(Params(memory).u32(bp.CMD_LINE_PTR), len(expected)) == expected


def refusal(source: BootSource, size: int = RAM) -> str:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - not a folder to walk
    try:
        source.check(size)
        with guest(size) as memory:
            load_linux(source, memory, ACPI)
    except OffmapError as error:
        text = str(error)
    assert "\n" not in text
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    return text


def test_initrd_larger_than_ram(source: Callable[..., BootSource], tmp_path: Path) -> None:
    made = source()
    os.truncate(tmp_path / "initrd", RAM)
    assert "(64 MiB) is larger than the guest's RAM (64 MiB); give the guest more" in refusal(made)
    # Smaller than RAM, but not than what the kernel leaves of it.
    os.truncate(tmp_path / "initrd", RAM - 8 * MIB)
    assert "the initrd" in refusal(made)
    assert "does not fit into" in refusal(made)


def test_initrd_that_is_none(source: Callable[..., BootSource], tmp_path: Path) -> None:
    assert "is empty; leave --initrd out" in refusal(source(initrd=b""))
    kernel = source(initrd=None).kernel
    assert "No such file" in refusal(BootSource(kernel, tmp_path / "none", ""))
    assert "not a regular file" in refusal(BootSource(kernel, tmp_path, ""))
    os.mkfifo(tmp_path / "fifo")
    assert "not a regular file" in refusal(BootSource(kernel, tmp_path / "fifo", ""))


def test_initrd_that_shrinks_while_it_is_read(
    source: Callable[..., BootSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = source(initrd=INITRD)
    real = os.fstat

    def fstat(fd: int) -> os.stat_result:
        status = real(fd)
        fields = list(status)
        if status.st_size == len(INITRD):
            fields[6] += 5 * PAGE
        return os.stat_result(fields)

    monkeypatch.setattr(os, "fstat", fstat)
    assert "is truncated" in refusal(made)


@pytest.mark.parametrize("size", [PAGE, 16 * PAGE, 512 << 10, MIB])
def test_ram_too_small_for_anything(source: Callable[..., BootSource], size: int) -> None:
    text = refusal(source(initrd=None), size)
    assert "does not fit into" in text
    assert "--memory-size" in text


def test_a_tiny_kernel_still_needs_room_for_the_tables(source: Callable[..., BootSource]) -> None:
    from .synthetic_kernel import DATA, TEXT

    low = vmlinux(
        EHDR._replace(e_entry=0x40000), (TEXT._replace(p_paddr=0x40000), DATA._replace(p_paddr=0x50000)), CODE[:0x3000]
    )
    assert "is not in the guest's RAM" in refusal(source(low, initrd=None), 512 << 10)
    with guest(MIB) as memory:
        assert load_linux(source(low, initrd=None), memory, ACPI) == 0x40000


def test_checking_opens_nothing_for_good(source: Callable[..., BootSource]) -> None:
    made = source()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(5):
        made.check(RAM)
        check_kernel(made.kernel)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
