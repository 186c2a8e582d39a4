"""The machine's only firmware: the code at a PC's BIOS entry point, where a guest jumps to reboot.

Linux jumps there if ACPI is hardware-reduced and there is no EFI (``machine_real_restart`` in
arch/x86/kernel/reboot.c). ``reboot_init`` chooses the EFI reset, which fails; the next choice is the BIOS, not ACPI.
Linux switches to real mode and jumps to f000:fff0. The code there writes to the reset register that the FADT names.
"""

from offmap.uapi.pc import ACPI_RESET_PORT, ACPI_RESET_VALUE

RESET_VECTOR = 0xFFFF0
"""Guest-physical address of f000:fff0; 16 bytes to the end of the first MiB."""

RESET_CODE = (
    b"\xfa"  # cli
    + (b"\xba" + ACPI_RESET_PORT.to_bytes(2, "little"))  # mov dx, ACPI_RESET_PORT
    + (b"\xb0" + ACPI_RESET_VALUE.to_bytes(1, "little"))  # mov al, ACPI_RESET_VALUE
    + b"\xee"  # out dx, al
    + b"\xf4"  # hlt
    + b"\xeb\xfd"  # jmp to the hlt
)
"""16-bit code, independent of any segment or stack."""
