"""The reset vector: the bytes are the instructions they are said to be."""

from offmap.boot.reset_vector import RESET_CODE, RESET_VECTOR
from offmap.devices.power import AcpiPm


def test_the_code_fits_and_writes_what_resets() -> None:
    assert RESET_VECTOR + len(RESET_CODE) <= 0x100000
    cli, mov_dx, low, high, mov_al, value, out_dx_al, hlt, jmp, back = RESET_CODE
    assert (cli, mov_dx, mov_al, out_dx_al, hlt) == (0xFA, 0xBA, 0xB0, 0xEE, 0xF4)
    assert jmp == 0xEB
    assert back - 256 == -3, "from behind the jump to the hlt"
    asked: list[str] = []
    pm = AcpiPm(lambda: asked.append("off"), lambda: asked.append("reset"))
    pm.write(high << 8 | low, 1, value)
    assert asked == ["reset"]
