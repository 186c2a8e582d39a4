"""/proc/kcore, from a core file made here."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offmap.audit.kcore import Kcore, Segment, direct_map_base, parse_program_headers
from offmap.audit.pageflags import KPF_HWPOISON, KPF_NOPAGE
from offmap.audit.regions import DIRECT_MAP, HOLE, KERNEL_TEXT, MODULES, VMALLOC, VMEMMAP, Layout
from offmap.audit.vmcoreinfo import VmcoreInfo, find_note
from offmap.errors import ExitStatus, Undetermined
from offmap.uapi.elf import ELF64_EHDR, ELF64_NHDR, ELF64_PHDR, EM_X86_64, ET_CORE, PT_LOAD, PT_NOTE

PAGE = 4096
BASE = 0xFF34_9308_0000_0000
NO_PADDR = (1 << 64) - 1
INFO = """\
OSRELEASE=6.12.0
SYMBOL(swapper_pg_dir)=ffffffff8ce22000
NUMBER(VMALLOC_START)=0xff8121fb80000000
SYMBOL(vmemmap)=ffde7975c0000000
NUMBER(phys_base)=1231028224
SYMBOL(init_top_pgt)=ffffffff8ce22000
NUMBER(pgtable_l5_enabled)=1
KERNELOFFSET=a200000
NUMBER(KERNEL_IMAGE_SIZE)=1073741824
NUMBER(sme_mask)=0
"""
LOADS = [
    (0xFFFF_FFFF_8B20_0000, 0x5480_0000, 2 * PAGE),
    (0xFF81_21FB_8000_0000, NO_PADDR, 0x31_FFFF_FFFF_FFFF),
    (BASE + 0x1000, 0x1000, 2 * PAGE),
    (BASE + 0x10_0000, 0x10_0000, 4 * PAGE),
]


def core(info: str = INFO, loads: list[tuple[int, int, int]] = LOADS) -> bytes:
    """A core file: headers, the note, and the bytes of every segment that has a physical address."""
    name = b"VMCOREINFO\0"
    note = ELF64_NHDR.pack(5, 4, 1) + b"CORE\0\0\0\0" + b"1234"
    note += ELF64_NHDR.pack(len(name), len(info), 0) + name + b"\0" + info.encode() + bytes(-len(info) % 4)
    start = ELF64_EHDR.size + ELF64_PHDR.size * (len(loads) + 1)
    headers = [ELF64_PHDR.pack(PT_NOTE, 0, start, 0, 0, len(note), 0, 0)]
    data_at = -(-(start + len(note)) // PAGE) * PAGE
    data = b""
    for va, pa, size in loads:
        headers.append(ELF64_PHDR.pack(PT_LOAD, 7, data_at + len(data), va, pa, size, size, PAGE))
        if pa != NO_PADDR:
            data += b"".join((pa + page * PAGE).to_bytes(8, "little") * (PAGE // 8) for page in range(size // PAGE))
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = ELF64_EHDR.pack(
        ident, ET_CORE, EM_X86_64, 1, 0, ELF64_EHDR.size, 0, 0, ELF64_EHDR.size, ELF64_PHDR.size, len(headers), 0, 0, 0
    )
    return (header + b"".join(headers) + note).ljust(data_at, b"\0") + data


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    (tmp_path / "kcore").write_bytes(core())
    flags = np.zeros(0x110, dtype="<u8")
    flags[0x101] = 1 << KPF_HWPOISON
    (tmp_path / "kpageflags").write_bytes(flags.tobytes())
    return str(tmp_path / "kcore"), str(tmp_path / "kpageflags")


def test_facts_of_the_kernel(files: tuple[str, str]) -> None:
    with Kcore(*files) as kcore:
        assert kcore.page_offset_base == BASE
        assert kcore.vmcoreinfo.root_pa == 0x5642_2000
        assert kcore.vmcoreinfo.levels == 5
        assert kcore.ram == [(0x1000, 0x3000), (0x10_0000, 0x10_4000)]
        assert not kcore.changed()


def test_reads_by_virtual_and_by_physical_address(files: tuple[str, str]) -> None:
    with Kcore(*files) as kcore:
        buffer = bytearray(16)
        kcore.read_virtual(BASE + 0x10_1000, memoryview(buffer))
        assert buffer == (0x10_1000).to_bytes(8, "little") * 2
        kcore.read_virtual(0xFFFF_FFFF_8B20_1000, memoryview(buffer))
        assert buffer == (0x5480_1000).to_bytes(8, "little") * 2
        wanted = np.array([0x1000, 0x2000, 0x10_0000, 0x10_2000, 0x10_3000], dtype=np.uint64)
        out = np.zeros((5, 512), dtype=np.uint64)
        kcore.read_pages(wanted, out)
        assert (out == wanted[:, None]).all()


def test_another_reader_has_a_file_of_its_own(files: tuple[str, str]) -> None:
    buffer = bytearray(16)
    with Kcore(*files) as kcore:
        with kcore.reader() as read:
            read(BASE + 0x10_1000, memoryview(buffer))
            assert buffer == (0x10_1000).to_bytes(8, "little") * 2
        with pytest.raises(Undetermined):
            read(BASE + 0x10_1000, memoryview(buffer))
        kcore.read_virtual(BASE + 0x10_0000, memoryview(buffer))
        assert buffer == (0x10_0000).to_bytes(8, "little") * 2


def test_read_outside_every_segment_is_refused(files: tuple[str, str]) -> None:
    with Kcore(*files) as kcore, pytest.raises(Undetermined, match="does not offer"):
        kcore.read_virtual(BASE + 0x3000 - 8, memoryview(bytearray(16)))


def test_which_pages_can_be_read(files: tuple[str, str]) -> None:
    pages = np.array([0, 0x1000, 0x2000, 0x3000, 0xF_F000, 0x10_3000, 0x10_4000, 1 << 51], dtype=np.uint64)
    with Kcore(*files) as kcore:
        assert kcore.in_ram(pages).tolist() == [False, True, True, False, False, True, False, False]
        # 0x11_0000 is past the end of kpageflags: no such page.
        asked = np.array([0x11_0000, 0x10_1000, 0x1000], dtype=np.uint64)
        assert kcore.zero_filled(asked).tolist() == [True, True, False]
        assert kcore.page_flags.range(0x110, 2).tolist() == [1 << KPF_NOPAGE] * 2


def test_segments_that_changed_are_noticed(files: tuple[str, str]) -> None:
    with Kcore(*files) as kcore:
        Path(files[0]).write_bytes(core(loads=[*LOADS, (BASE + (1 << 30), 1 << 30, PAGE)]))
        assert kcore.changed()


def test_missing_kcore_is_undetermined(tmp_path: Path) -> None:
    with pytest.raises(Undetermined, match="CONFIG_PROC_KCORE") as caught:
        Kcore(str(tmp_path / "none"))
    assert caught.value.exit_status is ExitStatus.UNDETERMINED


@pytest.mark.parametrize(
    "line", ["NUMBER(phys_base)=1231028224\n", "NUMBER(pgtable_l5_enabled)=1\n", "NUMBER(sme_mask)=0\n"]
)
def test_what_a_missing_line_of_vmcoreinfo_means(line: str) -> None:
    text = INFO.replace(line, "")
    if "sme_mask" in line:
        assert VmcoreInfo.parse(text).sme_mask == 0
    else:
        with pytest.raises(Undetermined, match="VMCOREINFO"):
            VmcoreInfo.parse(text)


def test_negative_phys_base_and_absent_top_table() -> None:
    text = INFO.replace("=1231028224", "=-4096").replace("SYMBOL(init_top_pgt)=ffffffff8ce22000\n", "")
    assert VmcoreInfo.parse(text).root_pa == 0xCE2_1000
    with pytest.raises(Undetermined, match="init_top_pgt"):
        VmcoreInfo.parse(text.replace("SYMBOL(swapper_pg_dir)=ffffffff8ce22000\n", ""))
    with pytest.raises(Undetermined, match="not a number"):
        VmcoreInfo.parse(INFO.replace("=1231028224", "=many"))


@given(st.binary(max_size=300))
def test_any_bytes_are_headers_or_undetermined(data: bytes) -> None:
    whole = core()
    with pytest.raises(Undetermined):
        parse_program_headers(data)
    with pytest.raises(Undetermined):
        parse_program_headers(whole[: min(len(data), 200)])


@given(st.binary(max_size=100))
def test_any_bytes_as_notes_do_not_fail(data: bytes) -> None:
    find_note(data, b"VMCOREINFO")


def test_base_is_what_most_ram_segments_say() -> None:
    kernel = Segment(0xFFFF_FFFF_8100_0000, 0x100_0000, PAGE, 0)
    ram = [Segment(BASE + pa, pa, PAGE, 0) for pa in (0, 0x5000)]
    odd = Segment(BASE + 0x9_0000, 0x8000, PAGE, 0)
    assert direct_map_base([kernel, kernel, kernel, odd, *ram]) == BASE
    with pytest.raises(Undetermined):
        direct_map_base([kernel])


def test_regions_of_a_5_level_kernel_with_kaslr() -> None:
    info = VmcoreInfo.parse(INFO)
    segments = [Segment(va, None if pa == NO_PADDR else pa, size, 0) for va, pa, size in LOADS]
    layout = Layout.of(info, BASE, segments)
    named = {
        BASE: DIRECT_MAP,
        BASE + (1 << 40): DIRECT_MAP,
        0xFF81_21FB_8000_0000: VMALLOC,
        0xFF81_21FB_8000_0000 + 0x31_FFFF_FFFF_F000: VMALLOC,
        0xFFDE_7975_C000_0000: VMEMMAP,
        0xFFFF_FE00_0000_1000: "cpu_entry_area mapping",
        0xFFFF_FF00_0000_0000: "%esp fixup stacks",
        0xFFFF_FFFF_8B20_0000: KERNEL_TEXT,
        0xFFFF_FFFF_C000_0000: MODULES,
        0xFFFF_FFFF_FF5F_F000: "kernel-internal fixmap range",
        BASE - PAGE: HOLE,
    }
    assert {va: layout.name(va) for va in named} == named


def test_regions_of_a_4_level_kernel_without_kaslr_and_without_help() -> None:
    text = INFO.replace("l5_enabled)=1", "l5_enabled)=0").replace("NUMBER(VMALLOC_START)", "X").replace("vmemmap", "X")
    layout = Layout.of(VmcoreInfo.parse(text), 0xFFFF_8880_0000_0000)
    assert layout.name(0xFFFF_8880_0000_0000) == DIRECT_MAP
    assert layout.name(0xFFFF_C900_0000_0000) == VMALLOC
    assert layout.name(0xFFFF_EA00_0000_0000) == VMEMMAP
    assert layout.name(0xFFFF_EC00_0000_0000) == "KASAN shadow memory"
    assert layout.name(0xFFFF_8800_0000_0000) == "LDT remap for PTI"


def test_vmemmap_may_lie_right_below_the_cpu_entry_area() -> None:
    # Bases of a Debian 6.12 host with no5lvl, 6 GiB of RAM and KASLR.
    text = INFO.replace("l5_enabled)=1", "l5_enabled)=0").replace("ffde7975c0000000", "fffffc0b80000000")
    base, vmalloc, vmemmap = 0xFFFF_8CEF_0000_0000, 0xFFFF_CED5_4000_0000, 0xFFFF_FC0B_8000_0000
    segments = [Segment(vmalloc, None, (32 << 40) - 1, 0), Segment(vmemmap, None, 0x3000, 0)]
    layout = Layout.of(VmcoreInfo.parse(text), base, segments)
    assert layout.vmemmap == vmemmap
    assert [layout.name(va) for va in (base, vmalloc, vmemmap)] == [DIRECT_MAP, VMALLOC, VMEMMAP]
