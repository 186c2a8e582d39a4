"""A real crash dump of a host with memory out: ``python -m tests.lab.kdump_target VMLINUZ before|after``.

Run in a disposable host with the module, and ``crashkernel=`` on its command line; it ends with that host. A process
fills hidden memory with one mark and ordinary memory with another, and the host panics. The crash kernel's only
program reads ``/proc/vmcore`` as a dump tool does, and says on the console how many pages have which mark. VMLINUZ is
the crash kernel; it is loaded before the memory is taken, or after.

    offmap lab exec --load-module --host-cmdline crashkernel=192M --console CONSOLE -- \
        python -m tests.lab.kdump_target VMLINUZ after; grep kdump: CONSOLE
"""

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

from .module_target import GUESTS, HOSTS, MIB, PAGE, SIZE, libc, open_device, take, words

SYS_KEXEC_FILE_LOAD = 320  # arch/x86/entry/syscalls/syscall_64.tbl
KEXEC_FILE_ON_CRASH = 2  # linux/kexec.h
COMMAND_LINE = b"console=ttyS0 nr_cpus=1 reset_devices panic=1\0"
READER = r"""
#include <elf.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

int main(void)
{
	static Elf64_Ehdr elf;
	unsigned long pages = 0, guests = 0, hosts = 0, failed = 0, word;
	time_t began = time(NULL);

	mkdir("/proc", 0755);
	mkdir("/dev", 0755);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("dev", "/dev", "devtmpfs", 0, NULL);
	freopen("/dev/ttyS0", "w", stdout);
	setvbuf(stdout, NULL, _IOLBF, 0);
	int core = open("/proc/vmcore", O_RDONLY);
	if (pread(core, &elf, sizeof(elf), 0) != sizeof(elf))
		printf("kdump: no /proc/vmcore\n");
	for (int i = 0; i < elf.e_phnum; i++) {
		Elf64_Phdr part;
		pread(core, &part, sizeof(part), elf.e_phoff + i * sizeof(part));
		if (part.p_type != PT_LOAD)
			continue;
		printf("kdump: part %lx-%lx\n", part.p_paddr, part.p_paddr + part.p_memsz);
		for (unsigned long at = 0; at < part.p_filesz; at += 4096, pages++) {
			word = 0;
			failed += pread(core, &word, 8, part.p_offset + at) != 8;
			guests += word == GUESTS;
			hosts += word == HOSTS;
		}
	}
	printf("kdump: %lu pages in %ld s: %lu guest's, %lu host's, %lu unreadable\n", pages,
		(long)(time(NULL) - began), guests, hosts, failed);
	sync();
	reboot(RB_POWER_OFF);
	for (;;)
		pause();
}
"""


def make_initramfs(folder: Path) -> Path:
    """An initramfs whose only program reads the dump."""
    (folder / "root").mkdir(parents=True)
    (folder / "init.c").write_text(READER)
    marks = [f"-DGUESTS={GUESTS:#x}ul", f"-DHOSTS={HOSTS:#x}ul"]
    subprocess.run(
        ["gcc", "-O1", "-w", "-static", *marks, "-o", folder / "root/init", folder / "init.c"],
        check=True,
    )
    archive = ["cpio", "-o", "-H", "newc", "--quiet"]
    with (folder / "initramfs").open("wb") as file:
        subprocess.run(archive, input=b"init\n", stdout=file, cwd=folder / "root", check=True)
    return folder / "initramfs"


def load(kernel: Path, initramfs: Path) -> None:
    """Load the crash kernel, as ``kexec -p -s`` does."""
    fds = [os.open(path, os.O_RDONLY) for path in (kernel, initramfs)]
    arguments = [ctypes.c_long(value) for value in (*fds, len(COMMAND_LINE))]
    flags = ctypes.c_long(KEXEC_FILE_ON_CRASH)
    if libc.syscall(SYS_KEXEC_FILE_LOAD, *arguments, ctypes.c_char_p(COMMAND_LINE), flags):
        raise OSError(ctypes.get_errno(), "kexec_file_load")


def main(kernel: str, when: str) -> None:
    initramfs = make_initramfs(Path("/run/kdump"))
    if when == "before":
        load(Path(kernel), initramfs)
    fd = open_device()
    take(fd)
    hidden = mmap.mmap(fd, SIZE)
    words(hidden)[:: PAGE // 8] = GUESTS
    plain = mmap.mmap(-1, 16 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    words(plain)[:: PAGE // 8] = HOSTS
    if when == "after":
        load(Path(kernel), initramfs)
    print(f"loaded: {Path('/sys/kernel/kexec_crash_loaded').read_text()}", flush=True)
    print(Path("/proc/iomem").read_text(), flush=True)
    # The lab ends a host soon after its console has named a panic: this one goes on without a console.
    Path("/sys/class/tty/ttyS0/console").write_text("N")
    Path("/proc/sysrq-trigger").write_text("c")


if __name__ == "__main__":
    main(*sys.argv[1:])
