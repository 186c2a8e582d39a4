"""Guest kernels: what is one is loaded where it belongs, and what is none is refused in one line."""

import mmap
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offmap.boot.kernel_image import LoadedKernel, check_kernel, load_kernel
from offmap.boot.memory_map import MemoryMap
from offmap.errors import OffmapError
from offmap.memory.backing import Backing
from offmap.memory.guest import GuestMemory
from offmap.memory.iomem import PhysicalRange
from offmap.uapi import bootparam as bp
from offmap.uapi.elf import ELF64_EHDR, ELF64_PHDR, ET_CORE, ET_DYN, PT_NOTE
from offmap.uapi.mman import MAP_NORESERVE

# synthetic_kernel.py is next to this file.
from .synthetic_kernel import BZIMAGE, CODE, DATA, EHDR, MIB, TEXT, bzimage, vmlinux

PAGE = 4096
RAM = 64 * MIB


def guest(size: int = RAM) -> GuestMemory:
    return GuestMemory([Backing("test", -1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)])


def load(
    path: Path, memory: GuestMemory, excluded: list[PhysicalRange] | None = None
) -> tuple[LoadedKernel, MemoryMap]:
    memory_map = MemoryMap([PhysicalRange(0, memory.size)], excluded or [])
    return load_kernel(path, memory, memory_map), memory_map


def is_free(memory_map: MemoryMap, address: int) -> bool:
    return any(r.start <= address < r.end for r in memory_map.free)


@pytest.fixture
def kernel(tmp_path: Path) -> Callable[[bytes], Path]:
    """Give a function that writes a kernel file."""

    def write(content: bytes) -> Path:
        path = tmp_path / "kernel"
        path.write_bytes(content)
        return path

    return write


def refusal(path: Path, size: int = RAM) -> str:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - not a folder to walk
    with guest(size) as memory:
        with pytest.raises(OffmapError) as caught:
            load(path, memory)
        text = str(caught.value)
        del caught
    assert "\n" not in text
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    return text


# bzImage


def test_bzimage_goes_where_it_prefers(kernel: Callable[[bytes], Path]) -> None:
    with guest() as memory:
        loaded, memory_map = load(kernel(bzimage()), memory)
        assert loaded.entry == 16 * MIB + 0x200
        assert memory.read(16 * MIB, len(CODE)) == CODE
        assert memory.read(16 * MIB + len(CODE), PAGE) == bytes(PAGE)
        assert (loaded.initrd_addr_max, loaded.cmdline_size) == (0x7FFFFFFF, 2047)
        # To the end that the jump says: boot.rst, "the end of setup header can be calculated".
        assert loaded.setup_header == bzimage()[0x1F1 : 0x202 + 0x6A]
        assert not is_free(memory_map, 16 * MIB)
        assert not is_free(memory_map, 20 * MIB - 1), "init_size, which is more than the file has"
        assert is_free(memory_map, 20 * MIB)


def test_bzimage_moves_if_its_place_is_taken_and_it_can(kernel: Callable[[bytes], Path]) -> None:
    excluded = [PhysicalRange(17 * MIB, 17 * MIB + PAGE)]
    with guest() as memory:
        loaded, _ = load(kernel(bzimage()), memory, excluded)
        address = loaded.entry - 0x200
        assert address % (2 * MIB) == 0
        assert address >= 17 * MIB + PAGE, "it would move itself to 16 MiB from below"
        assert memory.read(address, len(CODE)) == CODE
        with pytest.raises(OffmapError, match="does not fit"):
            load(kernel(bzimage({bp.RELOCATABLE_KERNEL: 0})), memory, excluded)


def test_bzimage_without_setup_sectors_has_four(kernel: Callable[[bytes], Path]) -> None:
    with guest() as memory:
        loaded, _ = load(kernel(bzimage({bp.SETUP_SECTS: 0})), memory)
        assert memory.read(loaded.entry - 0x200, len(CODE)) == CODE


def test_bzimage_takes_what_the_file_needs_if_init_size_is_less(kernel: Callable[[bytes], Path]) -> None:
    with guest() as memory:
        _, memory_map = load(kernel(bzimage({bp.INIT_SIZE: 0})), memory)
        assert not is_free(memory_map, 16 * MIB + len(CODE) - 1)


@pytest.mark.parametrize("end", [0x264 - 1, 0x264, 0x400, 2047, 2048, 2049, 2048 + len(CODE) - 1])
def test_truncated_bzimage(kernel: Callable[[bytes], Path], end: int) -> None:
    text = refusal(kernel(bzimage()[:end]))
    assert "is truncated" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({bp.XLOADFLAGS: 0}, "has no 64-bit entry (boot protocol 2.15)"),
        ({bp.VERSION: 0x20B}, "has no 64-bit entry (boot protocol 2.11)"),
        ({bp.VERSION: 0}, "has no 64-bit entry"),
        ({bp.INIT_SIZE: 0xFFFFFFFF}, "does not fit into"),
        ({bp.SYSSIZE: 0xFFFFFFFF}, "does not fit into"),
        ({bp.SYSSIZE: 3 * MIB // 16, bp.INIT_SIZE: 0}, "is truncated"),
        ({bp.SETUP_SECTS: 255, bp.SYSSIZE: len(CODE)}, "is truncated"),
        ({bp.PREF_ADDRESS: (1 << 64) - 1, bp.RELOCATABLE_KERNEL: 0}, "does not fit into"),
        ({bp.PREF_ADDRESS: 0, bp.RELOCATABLE_KERNEL: 0}, "does not fit into"),
    ],
)
def test_bzimage_that_cannot_be_loaded(kernel: Callable[[bytes], Path], changes: dict[int, int], message: str) -> None:
    assert message in refusal(kernel(bzimage(changes)))


FIELDS = {offset: struct.calcsize(fmt) for offset, (fmt, _) in BZIMAGE.items() if offset != bp.JUMP}
HOSTILE = st.dictionaries(
    st.sampled_from(sorted(FIELDS)),
    st.one_of(st.integers(0, 3), st.integers(0, (1 << 64) - 1), st.sampled_from([(1 << 64) - 1, 1 << 63, 1 << 31])),
).map(lambda changes: {offset: value & (1 << 8 * FIELDS[offset]) - 1 for offset, value in changes.items()})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(HOSTILE)
def test_hostile_bzimage_is_loaded_in_its_place_or_refused(
    kernel: Callable[[bytes], Path], changes: dict[int, int]
) -> None:
    path = kernel(bzimage(changes))
    with guest() as memory:
        memory.view(RAM - PAGE, PAGE)[:] = b"\xee" * PAGE
        try:
            loaded, memory_map = load(path, memory, [PhysicalRange(RAM - PAGE, RAM)])
        except OffmapError as error:
            assert "\n" not in str(error)
            return
        assert 0 <= loaded.entry < RAM
        assert not is_free(memory_map, loaded.entry)
        assert memory.read(RAM - PAGE, PAGE) == b"\xee" * PAGE


# ELF


def test_elf_segments_go_to_their_physical_addresses(kernel: Callable[[bytes], Path]) -> None:
    content = vmlinux()
    with guest() as memory:
        loaded, memory_map = load(kernel(content), memory)
        assert loaded.entry == EHDR.e_entry
        assert memory.read(16 * MIB, 0x2000) == content[0x1000:0x3000]
        assert memory.read(20 * MIB, 0x1000) == content[0x3000:0x4000]
        assert memory.read(20 * MIB + 0x1000, 0x7000) == bytes(0x7000), "bss"
        assert not is_free(memory_map, 20 * MIB + 0x7FFF)
        assert is_free(memory_map, 20 * MIB + 0x8000)
        header = loaded.setup_header
        assert header[bp.HEADER - 0x1F1 :][:4] == bp.HEADER_MAGIC
        assert struct.unpack_from("<H", header, bp.BOOT_FLAG - 0x1F1) == (0xAA55,)
        assert header[bp.LOADFLAGS - 0x1F1] == bp.LOADED_HIGH


def test_elf_ignores_what_is_not_loaded(kernel: Callable[[bytes], Path]) -> None:
    note = DATA._replace(p_type=PT_NOTE, p_paddr=0, p_offset=1 << 40)
    empty = DATA._replace(p_memsz=0, p_filesz=0, p_paddr=1 << 50)
    content = vmlinux(EHDR._replace(e_phnum=4), (TEXT, DATA, note, empty))
    with guest() as memory:
        assert load(kernel(content), memory)[0].entry == EHDR.e_entry


IDENT_32 = bytearray(EHDR.e_ident)
IDENT_32[4] = 1
IDENT_MSB = bytearray(EHDR.e_ident)
IDENT_MSB[5] = 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (vmlinux(EHDR._replace(e_ident=bytes(IDENT_32))), "for another machine than x86-64"),
        (vmlinux(EHDR._replace(e_ident=bytes(IDENT_MSB))), "for another machine than x86-64"),
        (vmlinux(EHDR._replace(e_machine=183)), "for another machine than x86-64"),
        (vmlinux(EHDR._replace(e_type=ET_DYN)), "no kernel (e_type 3, not ET_EXEC)"),
        (vmlinux(EHDR._replace(e_type=ET_CORE)), "no kernel (e_type 4"),
        (vmlinux(EHDR._replace(e_phnum=0)), "no program headers"),
        (vmlinux(EHDR._replace(e_phnum=65535)), "no program headers"),
        (vmlinux(EHDR._replace(e_phoff=1 << 63)), "no program headers"),
        (vmlinux(EHDR._replace(e_phentsize=32)), "no program headers"),
        (vmlinux(EHDR._replace(e_entry=0)), "no loadable segment at its entry 0x0"),
        (vmlinux(EHDR._replace(e_entry=16 * MIB + 0x2000)), "no loadable segment at its entry"),
        (vmlinux(EHDR._replace(e_entry=0xFFFFFFFF81000000)), "no loadable segment at its entry"),
        (vmlinux(phdrs=(TEXT, DATA._replace(p_filesz=0x9000))), "larger in the file than in memory"),
        (vmlinux(phdrs=(TEXT, DATA._replace(p_memsz=1 << 40))), "does not fit into"),
        (vmlinux(phdrs=(TEXT, DATA._replace(p_paddr=(1 << 64) - 0x8000))), "does not fit into"),
        (vmlinux(phdrs=(TEXT, DATA._replace(p_paddr=0))), "does not fit into"),
        (vmlinux(phdrs=(TEXT, DATA._replace(p_paddr=TEXT.p_paddr + 0x1000))), "segments that overlap in memory"),
        (vmlinux(phdrs=(TEXT,) * 1000), "segments that overlap in memory"),
        (vmlinux(phdrs=(TEXT, DATA._replace(p_offset=1 << 62))), "is truncated"),
        (vmlinux(phdrs=(TEXT, DATA._replace(p_offset=(1 << 64) - 1))), "is truncated"),
        (vmlinux(phdrs=(TEXT._replace(p_type=PT_NOTE), DATA)), "no loadable segment at its entry"),
    ],
)
def test_elf_that_cannot_be_loaded(kernel: Callable[[bytes], Path], content: bytes, message: str) -> None:
    assert message in refusal(kernel(content))


@pytest.mark.parametrize("end", [4, 16, ELF64_EHDR.size - 1, ELF64_EHDR.size, ELF64_EHDR.size + ELF64_PHDR.size])
def test_elf_truncated_in_its_headers(kernel: Callable[[bytes], Path], end: int) -> None:
    text = refusal(kernel(vmlinux()[:end]))
    assert "is truncated" in text or "no program headers" in text


@pytest.mark.parametrize("end", [0x1000, 0x2FFF, 0x3000, 0x3FFF])
def test_elf_truncated_in_a_segment(kernel: Callable[[bytes], Path], end: int) -> None:
    assert "is truncated" in refusal(kernel(vmlinux()[:end]))


WORD = st.one_of(st.integers(0, 8), st.integers(0, (1 << 64) - 1), st.integers(15 * MIB, 21 * MIB))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.tuples(WORD, WORD, WORD, WORD, WORD), st.sampled_from(range(6)), st.tuples(WORD, WORD, st.integers(0, 65535)))
def test_hostile_elf_is_loaded_in_its_place_or_refused(
    kernel: Callable[[bytes], Path], words: tuple[int, ...], keep: int, head: tuple[int, int, int]
) -> None:
    offset, paddr, filesz, memsz, align = (
        value if n != keep else original
        for n, (value, original) in enumerate(zip(words, (0x3000, 20 * MIB, 0x1000, 0x8000, 0x1000), strict=True))
    )
    phdr = DATA._replace(p_offset=offset, p_paddr=paddr, p_filesz=filesz, p_memsz=memsz, p_align=align)
    ehdr = EHDR if keep % 2 else EHDR._replace(e_entry=head[0], e_phoff=head[1], e_phnum=head[2])
    path = kernel(vmlinux(ehdr, (TEXT, phdr)))
    with guest() as memory:
        try:
            loaded, memory_map = load(path, memory)
        except OffmapError as error:
            assert "\n" not in str(error)
            return
        assert not is_free(memory_map, loaded.entry)


# Neither


@pytest.mark.parametrize("size", [1, 3, 512, 1024, PAGE, 0x20000])
def test_what_is_no_kernel_is_refused_by_its_first_bytes(kernel: Callable[[bytes], Path], size: int) -> None:
    path = kernel(b"\x42" * size)
    assert "neither a bzImage nor an ELF file" in refusal(path)
    with pytest.raises(OffmapError, match="neither"):
        check_kernel(path)


def test_missing_empty_folder_fifo_and_device(tmp_path: Path, kernel: Callable[[bytes], Path]) -> None:
    assert "No such file or directory" in refusal(tmp_path / "none")
    assert "is empty" in refusal(kernel(b""))
    assert "Is a directory" in refusal(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    assert "give a bzImage" in refusal(tmp_path / "fifo")  # and does not wait for a writer
    assert "is neither" in refusal(Path("/dev/zero"))
    assert "is empty" in refusal(Path("/dev/null"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=2000), st.sampled_from([b"", b"\x7fELF", b"\x7fELF\x02\x01\x01"]))
def test_any_file_is_refused_in_one_line(kernel: Callable[[bytes], Path], content: bytes, start: bytes) -> None:
    refusal(kernel(start + content))


@pytest.mark.parametrize("content", [bzimage(), vmlinux()], ids=["bzImage", "vmlinux"])
@pytest.mark.parametrize("size", [PAGE, MIB, 2 * MIB, 4 * MIB])
def test_ram_that_is_too_small_is_said_with_both_figures(
    kernel: Callable[[bytes], Path], content: bytes, size: int
) -> None:
    text = refusal(kernel(content), size)
    assert "the guest kernel needs 4.0 MiB" in text or "the guest kernel needs 4 MiB" in text
    assert "--memory-size" in text
