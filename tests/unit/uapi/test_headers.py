"""Everything in offmap.uapi that the installed kernel headers also know, compared with them by one C program.

The names come from the modules themselves, so that nothing that is added to them escapes.
"""

import ctypes
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from offmap.uapi import bootparam, elf, fs, ioctl, kvm, mman
from offmap.uapi.virtio import blk, config, mmio, ring

HEADERS = """
#define _GNU_SOURCE
#define PAGE_SIZE 4096
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <linux/elf.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/kvm.h>
#include <linux/kvm_para.h>
#include <linux/mman.h>
#include <linux/memfd.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ids.h>
#include <linux/virtio_mmio.h>
#include <linux/virtio_ring.h>
#include <asm/bootparam.h>
"""

MODULES = (kvm, mman, bootparam, elf, fs, blk, config, mmio, ring)

NEWER = {
    # In no header of Linux 6.1, which is Debian 12's.
    *(
        "KVM_EXIT_MEMORY_FAULT",
        "KVM_CAP_USER_MEMORY2",
        "KVM_SET_USER_MEMORY_REGION2",
    ),  # 6.8
    *("KVM_CAP_GUEST_MEMFD", "KVM_MEM_GUEST_MEMFD", "KVM_CREATE_GUEST_MEMFD"),  # 6.8
    *("KVM_CAP_GUEST_MEMFD_FLAGS", "GUEST_MEMFD_FLAG_MMAP", "GUEST_MEMFD_FLAG_INIT_SHARED"),  # 6.18
    "KVM_CAP_X86_KVMCLOCK_HVA",  # of the series in kernel/patches
}

NOT_IN_UAPI = {
    # Facts of boot.rst and of headers that are not exported; where bootparam.py has them from.
    *("BOOT_FLAG_MAGIC", "HEADER_MAGIC", "TYPE_OF_LOADER_UNDEFINED", "ENTRY_64_OFFSET", "COMMAND_LINE_SIZE"),
    *("E820_RAM", "E820_RESERVED", "E820_ACPI", "E820_ENTRY_FORMAT"),
    # Ours: struct formats, compared with the structures below.
    *("ELF64_EHDR", "ELF64_PHDR", "ELF64_NHDR"),
}

RENAMED = {"BOOT_PARAMS_SIZE": "sizeof(struct boot_params)"}

BOOTPARAM_H = (Path("/usr/include/x86_64-linux-gnu/asm/bootparam.h"), Path("/usr/include/asm/bootparam.h"))

ANONYMOUS = {
    # Our name -> the member of struct kvm_run that has the structure as its type, which has no name in the header.
    "kvm_run_io": "io",
    "kvm_run_mmio": "mmio",
    "kvm_run_internal": "internal",
    "kvm_run_fail_entry": "fail_entry",
    "kvm_run_system_event": "system_event",
    "kvm_run_memory_fault": "memory_fault",
}

GUARDS = {
    # A structure that is newer than the header, and a macro that came with it.
    "kvm_userspace_memory_region2": "KVM_SET_USER_MEMORY_REGION2",
    "kvm_create_guest_memfd": "KVM_CREATE_GUEST_MEMFD",
    "kvm_run_memory_fault": "KVM_EXIT_MEMORY_FAULT",
}

FLEXIBLE = {"kvm_run", "virtio_blk_config"}  # longer in the header than what we declare of it


class Question:
    """A name of ours, what we say it is, and the C expression that must say the same."""

    def __init__(self, name: str, ours: int, expression: str, guard: str | None = None) -> None:
        self.name = name
        self.ours = ours
        self.expression = expression
        self.guard = guard

    def c(self) -> str:
        line = f'    printf("%s %lld\\n", "{self.name}", (long long)({self.expression}));'
        return f"#ifdef {self.guard}\n{line}\n#endif" if self.guard else line


def constants(module: ModuleType) -> Iterator[tuple[str, int]]:
    for name, value in vars(module).items():
        if isinstance(value, int) and name.upper() == name.replace("SYS_memfd_secret", "SYS_MEMFD_SECRET"):
            yield name, value


def boot_offset(name: str) -> str | None:
    """The C expression of an offset into struct boot_params, for a name of bootparam.py that is one."""
    if name == "SETUP_HEADER":
        return "offsetof(struct boot_params, hdr)"
    text = next((path.read_text() for path in BOOTPARAM_H if path.exists()), "")
    for kind, prefix in (("setup_header", "hdr."), ("boot_params", "")):
        body = re.search(rf"struct {kind} {{(.*?)\n}}", text, re.DOTALL)
        if body and re.search(rf"\b{name.lower()}(\[[^;]*)?;", body[1]):
            return f"offsetof(struct boot_params, {prefix}{name.lower()})"
    return None


def constant_questions() -> Iterator[Question]:
    for module in MODULES:
        for name, value in constants(module):
            if name in NOT_IN_UAPI:
                continue
            if name in RENAMED:
                yield Question(name, value, RENAMED[name])
            elif module is bootparam and (offset := boot_offset(name)):
                yield Question(name, value, offset)
            else:
                yield Question(name, value, name, guard=name)
    for name in ("_IOC_NRSHIFT", "_IOC_TYPESHIFT", "_IOC_SIZESHIFT", "_IOC_DIRSHIFT", "_IOC_NONE", "_IOC_WRITE"):
        yield Question(name, getattr(ioctl, name), name)
    yield Question("_IOC_READ", ioctl._IOC_READ, "_IOC_READ")


def structure_questions() -> Iterator[Question]:
    for name, value in [*vars(kvm).items(), *vars(blk).items()]:
        if not (
            isinstance(value, type)
            and issubclass(value, ctypes.Structure)
            and value.__module__ in {kvm.__name__, blk.__name__}
        ):
            continue
        guard = GUARDS.get(name)
        member = ANONYMOUS.get(name)
        if member is None:
            if name not in FLEXIBLE:
                yield Question(f"sizeof:{name}", ctypes.sizeof(value), f"sizeof(struct {name})", guard)
        else:
            yield Question(f"sizeof:{name}", ctypes.sizeof(value), f"sizeof(((struct kvm_run *)0)->{member})", guard)
        for field, *_ in value._fields_:
            if field == "exit":  # the union has no name in the header; its members are asked for below
                continue
            ours: int = getattr(value, field).offset
            size: int = getattr(value, field).size
            if member is None:
                where, what = f"offsetof(struct {name}, {field})", f"sizeof(((struct {name} *)0)->{field})"
            else:
                union = kvm.kvm_run.exit.offset
                where = f"offsetof(struct kvm_run, {member}.{field}) - {union}"
                what = f"sizeof(((struct kvm_run *)0)->{member}.{field})"
            yield Question(f"offsetof:{name}.{field}", ours, where, guard)
            yield Question(f"size:{name}.{field}", size, what, guard)
    for member in ANONYMOUS.values():
        guard = GUARDS.get(f"kvm_run_{member}")
        yield Question(
            f"offsetof:kvm_run.{member}", kvm.kvm_run.exit.offset, f"offsetof(struct kvm_run, {member})", guard
        )


def format_questions() -> Iterator[Question]:
    """The structures that are declared as formats of the struct module."""
    flock = ("l_type", "l_whence", "l_start", "l_len", "l_pid")
    formats = [
        ("Elf64_Ehdr", elf.ELF64_EHDR.format, elf.Elf64_Ehdr._fields),
        ("Elf64_Phdr", elf.ELF64_PHDR.format, elf.Elf64_Phdr._fields),
        ("Elf64_Nhdr", elf.ELF64_NHDR.format, elf.Elf64_Nhdr._fields),
        ("struct boot_e820_entry", bootparam.E820_ENTRY_FORMAT, ("addr", "size", "type")),
        ("struct virtio_blk_outhdr", blk.VIRTIO_BLK_OUTHDR.format, ("type", "ioprio", "sector")),
        (
            "struct virtio_blk_discard_write_zeroes",
            blk.VIRTIO_BLK_DISCARD_WRITE_ZEROES.format,
            ("sector", "num_sectors", "flags"),
        ),
        ("struct flock", mman.FLOCK.format, flock),
    ]
    for name, text, fields in formats:
        yield Question(f"sizeof:{name.replace(' ', '_')}", struct.calcsize(text), f"sizeof({name})")
        before = text[0]
        names = iter(fields)
        for code in re.findall(r"\d*[a-zA-Z]", text):
            if code[-1] != "x":
                field = next(names)
                question = f"offsetof:{name.replace(' ', '_')}.{field}"
                yield Question(question, struct.calcsize(before), f"offsetof({name}, {field})")
            before += code
        assert next(names, None) is None


QUESTIONS = [*constant_questions(), *structure_questions(), *format_questions()]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What the headers say, by name."""
    compiler = shutil.which("gcc")
    if compiler is None or not Path("/usr/include/linux/kvm.h").exists():
        pytest.skip("no gcc or no kernel headers: no structure, offset or number was compared (gcc, linux-libc-dev)")
    folder = tmp_path_factory.mktemp("headers")
    source, program = folder / "ask.c", folder / "ask"
    body = "\n".join(question.c() for question in QUESTIONS)
    source.write_text(f"{HEADERS}\nint main(void)\n{{\n{body}\n    return 0;\n}}\n")
    built = subprocess.run([compiler, "-w", "-o", program, source], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    output = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in (line.rsplit(" ", 1) for line in output.splitlines())}


def test_everything_is_as_the_headers_say(answers: dict[str, int]) -> None:
    # Compared as unsigned: ioctl numbers have their top bit set.
    wrong = {
        question.name: (question.ours, answers[question.name])
        for question in QUESTIONS
        if question.name in answers and (question.ours - answers[question.name]) % (1 << 32)
    }
    assert not wrong
    assert len(answers) > 300


def test_only_what_is_newer_is_not_in_the_headers(answers: dict[str, int]) -> None:
    absent = {question.guard or question.name for question in QUESTIONS if question.name not in answers}
    assert absent <= NEWER, "misspelt, or newer than the installed headers"
    if absent:
        names = sorted(absent | {name for name, guard in GUARDS.items() if guard in absent})
        pytest.skip(f"too new for the installed headers, and not compared: {', '.join(names)}")


def test_magic_numbers_are_those_of_the_headers() -> None:
    assert elf.ELFMAG == b"\x7fELF"
    assert (0x53726448).to_bytes(4, "little") == bootparam.HEADER_MAGIC  # boot.rst: "Magic signature HdrS (0x53726448)"


@pytest.mark.parametrize("module", MODULES)
def test_no_constant_escapes(module: ModuleType) -> None:
    asked = {question.name for question in QUESTIONS}
    public = {name for name, value in vars(module).items() if isinstance(value, int) and not name.startswith("_")}
    assert public - asked - NOT_IN_UAPI == set()
