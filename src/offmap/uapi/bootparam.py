"""The Linux/x86 boot protocol: arch/x86/include/uapi/asm/bootparam.h and Documentation/arch/x86/{boot,zero-page}.rst.

Offsets into ``struct boot_params`` (the "zero page"), which are those of the kernel file too for the setup header.
"""

BOOT_PARAMS_SIZE = 4096

# struct boot_params
ACPI_RSDP_ADDR = 0x070  # u64, since 2.14
EXT_RAMDISK_IMAGE = 0x0C0  # u32: bits 63:32
EXT_CMD_LINE_PTR = 0x0C8  # u32
E820_ENTRIES = 0x1E8  # u8
E820_TABLE = 0x2D0  # struct boot_e820_entry[E820_MAX_ENTRIES_ZEROPAGE]

E820_MAX_ENTRIES_ZEROPAGE = 128
E820_ENTRY_FORMAT = "<QQI"  # struct boot_e820_entry: addr, size, type
E820_RAM = 1
E820_RESERVED = 2
E820_ACPI = 3

# struct setup_header
SETUP_HEADER = 0x1F1
SETUP_SECTS = 0x1F1  # u8
SYSSIZE = 0x1F4  # u32: protected-mode code in units of 16 bytes
BOOT_FLAG = 0x1FE  # u16: 0xAA55
JUMP = 0x200  # u16: its second byte, plus 0x202, is where the header ends
HEADER = 0x202  # u32: "HdrS"
VERSION = 0x206  # u16
TYPE_OF_LOADER = 0x210  # u8
LOADFLAGS = 0x211  # u8
RAMDISK_IMAGE = 0x218  # u32
RAMDISK_SIZE = 0x21C  # u32
CMD_LINE_PTR = 0x228  # u32
INITRD_ADDR_MAX = 0x22C  # u32
KERNEL_ALIGNMENT = 0x230  # u32
RELOCATABLE_KERNEL = 0x234  # u8
XLOADFLAGS = 0x236  # u16
CMDLINE_SIZE = 0x238  # u32
PAYLOAD_OFFSET = 0x248  # u32
PREF_ADDRESS = 0x258  # u64
INIT_SIZE = 0x260  # u32

BOOT_FLAG_MAGIC = 0xAA55
HEADER_MAGIC = b"HdrS"
LOADED_HIGH = 1 << 0
XLF_KERNEL_64 = 1 << 0
TYPE_OF_LOADER_UNDEFINED = 0xFF
ENTRY_64_OFFSET = 0x200  # of the 64-bit entry in the protected-mode code

COMMAND_LINE_SIZE = 2048  # arch/x86/include/asm/setup.h, including the final zero
