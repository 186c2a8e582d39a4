"""ACPI tables: encodings by example and by property, checksums, and the judgement of ACPICA's own compiler."""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offmap.boot.acpi import AcpiDevice, AcpiImage, aml, build_tables, devices, virtio_mmio
from offmap.devices import power
from offmap.errors import OffmapError

IASL = shutil.which("iasl")


def decode_pkg_length(data: bytes) -> tuple[int, int]:
    """ACPI 6.4, section 20.2.4: the length that the field says, and the field's size."""
    following = data[0] >> 6
    if not following:
        return data[0] & 0x3F, 1
    return data[0] & 0x0F | int.from_bytes(data[1 : 1 + following], "little") << 4, 1 + following


@given(st.integers(0, (1 << 28) - 5))
def test_pkg_length_counts_itself_and_is_as_short_as_can_be(content: int) -> None:
    field = aml.pkg_length(content)
    assert decode_pkg_length(field) == (content + len(field), len(field))
    if len(field) > 1:
        shorter = len(field) - 1
        assert content + shorter > (0x3F if shorter == 1 else (1 << 4 + 8 * (shorter - 1)) - 1)


@pytest.mark.parametrize(
    ("content", "field"),
    [(0, "01"), (62, "3f"), (63, "4104"), (4093, "4fff"), (4094, "810001"), (0xFFFFC, "8fffff"), (0xFFFFD, "c1000001")],
)
def test_pkg_length_at_its_limits(content: int, field: str) -> None:
    assert aml.pkg_length(content).hex() == field


def test_pkg_length_refuses_what_it_cannot_say() -> None:
    assert len(aml.pkg_length((1 << 28) - 5)) == 4
    with pytest.raises(ValueError, match="longer than"):
        aml.pkg_length((1 << 28) - 4)


@given(st.integers(0, (1 << 64) - 1))
def test_integers_are_as_short_as_can_be(value: int) -> None:
    encoded = aml.integer(value)
    if value < 2:
        assert encoded == bytes([value])
    else:
        assert int.from_bytes(encoded[1:], "little") == value
        assert len(encoded) == 2 or value >= 1 << 4 * (len(encoded) - 1)


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_integers_out_of_range_are_refused(value: int) -> None:
    with pytest.raises(ValueError, match="64-bit"):
        aml.integer(value)


@pytest.mark.parametrize(
    ("path", "encoded"),
    [
        ("RTC", b"RTC_"),
        (r"\_SB", b"\\_SB_"),
        (r"\_SB.COM1", b"\\\x2e_SB_COM1"),
        ("^^A.B.C", b"^^\x2f\x03A___B___C___"),
        ("\\", b"\\\0"),
    ],
)
def test_names(path: str, encoded: bytes) -> None:
    assert aml.name_string(path) == encoded


@pytest.mark.parametrize("path", ["com1", "TOOLONG", "1ABC", "A..B", "A-B", "\\\\A", "^\\A"])
def test_what_is_no_name_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="no AML name"):
        aml.name_string(path)


def test_eisa_ids_and_strings() -> None:
    assert aml.eisaid("PNP0501") == b"\x0c\x41\xd0\x05\x01"
    for wrong in ("PNP050", "pnp0501", "P1P0501"):
        with pytest.raises(ValueError, match="EISA"):
            aml.eisaid(wrong)
    with pytest.raises(ValueError, match="NUL"):
        aml.string("a\0b")


def image(vcpus: int = 4) -> AcpiImage:
    devices = [virtio_mmio(0, 0xD0000000, 0x1000, 5), virtio_mmio(1, 0x2_0000_0000, 0x1000, 23)]
    return build_tables(vcpus, devices)


def offset(tables: AcpiImage, signature: str) -> int:
    """Where the table of this signature is in the blob."""
    return next(at for at in range(0, len(tables.blob), 16) if tables.blob[at:].startswith(signature.encode()))


def table(tables: AcpiImage, signature: str) -> bytes:
    """Its bytes."""
    start = offset(tables, signature)
    return tables.blob[start : start + int.from_bytes(tables.blob[start + 4 : start + 8], "little")]


@given(st.integers(1, 254), st.sampled_from([0x0, 0xE0000, 0x7FFF0000, 0x1_0000_0000]))
def test_every_checksum_and_pointer_is_right(vcpus: int, base: int) -> None:
    tables = build_tables(vcpus, base=base)
    rsdp = tables.blob[:36]
    assert sum(rsdp) % 256 == sum(rsdp[:20]) % 256 == 0
    assert rsdp[:8] == b"RSD PTR "
    assert tables.rsdp_address == base
    addresses = {signature: base + offset(tables, signature) for signature in ("XSDT", "FACP", "APIC", "DSDT")}
    assert struct.unpack_from("<Q", rsdp, 24) == (addresses["XSDT"],)
    for signature, address in addresses.items():
        assert sum(table(tables, signature)) % 256 == 0
        assert address % 16 == 0
    entries = struct.iter_unpack("<Q", table(tables, "XSDT")[36:])
    assert [entry for (entry,) in entries] == [addresses["FACP"], addresses["APIC"]]
    assert struct.unpack_from("<Q", table(tables, "FACP"), 140) == (addresses["DSDT"],)


def test_madt_lists_every_vcpu_the_io_apic_and_the_timer_s_pin() -> None:
    body = table(image(3), "APIC")[44:]
    entries = []
    while body:
        entries.append(body[: body[1]])
        body = body[body[1] :]
    assert [tuple(entry[:4]) for entry in entries if entry[0] == 0] == [(0, 8, n, n) for n in range(3)]
    assert struct.unpack("<BBBBII", next(e for e in entries if e[0] == 1))[4:] == (0xFEC00000, 0)
    assert struct.unpack("<BBBBIH", next(e for e in entries if e[0] == 2))[2:] == (0, 0, 2, 0)


def test_fadt_is_hardware_reduced_and_names_the_registers_that_answer() -> None:
    fadt = table(image(), "FACP")
    assert len(fadt) == 276
    flags, boot = struct.unpack_from("<I", fadt, 112)[0], struct.unpack_from("<H", fadt, 109)[0]
    assert flags >> 20 & 1
    assert not boot & 0x02, "no i8042 to probe"
    assert not boot & 0x20, "there is a CMOS clock"
    register = [struct.unpack_from("<BBBBQ", fadt, offset) for offset in (116, 244, 256)]
    assert {(space, width) for space, width, *_ in register} == {(1, 8)}
    answered = {port for ports in power.AcpiPm(print, print).ports() for port in ports}
    assert {address for *_, address in register} <= answered


@pytest.mark.parametrize("vcpus", [0, 255])
def test_too_few_or_too_many_vcpus_are_refused(vcpus: int) -> None:
    with pytest.raises(OffmapError, match="vCPUs"):
        build_tables(vcpus)


@pytest.mark.parametrize("name", ["COM1", "C000", "V000"])
def test_two_devices_of_one_name_are_refused(name: str) -> None:
    with pytest.raises(OffmapError, match="same ACPI name"):
        build_tables(1, [virtio_mmio(0, 0xD0000000, 0x1000, 5), AcpiDevice(name, "PNP0C0C")])


def test_isa_interrupts_are_checked() -> None:
    with pytest.raises(ValueError, match="ISA"):
        devices.irq_no_flags(16)


def judge(binary_table: bytes, tmp_path: Path) -> str:
    """Disassemble a table, compile the result with every warning an error; the source."""
    if IASL is None:
        pytest.skip("iasl (acpica-tools) is not installed: the tables were not checked by ACPICA's compiler")
    binary = tmp_path / "table.dat"
    binary.write_bytes(binary_table)
    taken_apart = subprocess.run([IASL, "-d", binary], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert not {"error", "warning", "invalid"} & set(taken_apart.stderr.lower().replace(":", " ").split())
    assert "Warning" not in taken_apart.stderr
    source = tmp_path / "table.dsl"
    text = source.read_text()
    assert "Error" not in text
    compiled = subprocess.run(
        [IASL, "-we", "-oa", "-p", tmp_path / "again", source],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert compiled.returncode == 0, compiled.stdout + compiled.stderr
    assert "0 Errors, 0 Warnings, 0 Remarks" in compiled.stdout
    again = (tmp_path / "again.aml").read_bytes()
    assert again[36:] == binary_table[36:], "compiled again, only the header's creator and checksum differ"
    return text


@pytest.mark.parametrize("signature", ["DSDT", "FACP", "APIC", "XSDT"])
@pytest.mark.parametrize("vcpus", [1, 16])
def test_iasl_understands_every_table(signature: str, vcpus: int, tmp_path: Path) -> None:
    text = judge(table(image(vcpus), signature), tmp_path)
    if signature == "DSDT":
        assert text.count("ACPI0007") == vcpus
        assert 'EisaId ("PNP0501")' in text
        assert "0x0000000200000000, // Range Minimum" in text


def test_iasl_understands_every_term(tmp_path: Path) -> None:
    terms = (
        aml.name("BUFF", aml.buffer(bytes(range(100)))),
        aml.name("PACK", aml.package(aml.integer(1 << 40), aml.string("text"), aml.integer(0x1234))),
    )
    text = judge(table(build_tables(1, [AcpiDevice("ODD0", "LNRO0005", 9, terms=terms)]), "DSDT"), tmp_path)
    assert "0x0000010000000000" in text
