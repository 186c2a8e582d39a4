"""The QEMU command line of a disposable host."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from offmap import units
from offmap.lab.errors import LabError

QEMU = "qemu-system-x86_64"

NO_SELF_TESTS = "cryptomgr.notests initcall_blacklist=jent_mod_init"
"""For a kernel's command line: no tests of its ciphers and its jitter-entropy source, a seventh of an emulated boot."""

# console: loglevel 5 is quiet until something is wrong, and then shows all of an oops.
# panic=-1 with -no-reboot: a panic ends QEMU at once. oops=panic: a host that oopsed proves nothing any more.
# tsc=reliable, no_timer_check: an emulated CPU is too uneven for the watchdogs of clocks.
# kvm.tsc_tolerance_ppm: a KVM that is built in starts before the TSC's frequency is refined, by up to 1 %, on a busy
# machine; it then leaves a guest a TSC that stands still, and no timer (set_tsc_khz in arch/x86/kvm/x86.c, without
# TSC scaling).
# edd=off: no BIOS disk calls; random.trust_cpu: no wait for entropy.
CMDLINE = (
    "console=ttyS0 loglevel=5 panic=-1 oops=panic tsc=reliable no_timer_check edd=off"
    f" random.trust_cpu=on nmi_watchdog=0 kvm.tsc_tolerance_ppm=10000 {NO_SELF_TESTS}"
)

_EMULATED = "max,+svm,+npt,-erms,-fsrm"
ACCEL = {
    # One thread: with thread=multi and 2 CPUs a 6.12 host oopsed in __schedule (QEMU 7.2).
    # -erms, -fsrm: an emulated "rep movsb" copies byte by byte. Kernel and libc use it where the processor promises
    # that it is fast; a scan of all memory takes twice as long then, and zeroing page by page looks ten times as slow.
    "tcg": ["-accel", "tcg,thread=single", "-cpu", _EMULATED],
    # An instruction takes a nanosecond, by the host's clocks: what is timed in it depends on what was executed, not on
    # how busy the machine is.
    "icount": ["-accel", "tcg,thread=single", "-cpu", _EMULATED, "-icount", "shift=0"],
    "kvm": ["-accel", "kvm", "-cpu", "host"],
}

MAX_NODES = 8
MIN_MEMORY = 128 << 20  # a Debian kernel with this initramfs does not come up in less
MAX_MEMORY = 1 << 46  # what x86-64 addresses with four levels of page tables


@dataclass(frozen=True)
class HostOptions:
    """What a disposable host is made of.

    Attributes:
        memory: its RAM, in bytes.
        cmdline: appended to its kernel command line, as it is.
        out: folder shared writable, or None.
        accel: of ``ACCEL``.
        nodes: NUMA nodes that share its RAM evenly; the first has the processor.
        plugin: a TCG plugin and its arguments, as QEMU's ``-plugin`` takes them; empty for none.
        devices: more arguments for QEMU, as they are.
    """

    memory: int
    cmdline: str = ""
    out: Path | None = None
    accel: str = "tcg"
    nodes: int = 1
    plugin: str = ""
    devices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= MAX_NODES:
            raise LabError(f"a host cannot have {self.nodes} NUMA nodes", f"give 1 to {MAX_NODES}")
        if self.memory // self.nodes < MIN_MEMORY:
            raise LabError(f"{self.nodes} NUMA nodes need more memory", "give at least 128M for each")


def parse_size(text: str) -> int:
    """The bytes of a host's RAM, as QEMU takes it: ``2G``, ``512M``, or a number of MiB.

    Raises:
        OffmapError: it is not a size, or no host can have it.
    """
    size = units.parse_size(f"{text}M" if text.isdecimal() else text)
    if not MIN_MEMORY <= size <= MAX_MEMORY:
        raise LabError(f"a host cannot have {text} of memory", "give 128M to 64T")
    return size


def find_qemu() -> str:
    """Return the path of QEMU. Raises LabError: it is not installed."""
    path = shutil.which(QEMU)
    if path is None:
        raise LabError(f"no {QEMU} command", "install qemu-system-x86")
    return path


@dataclass(frozen=True)
class Ram:
    """Files that hold a host's RAM.

    Attributes:
        fds: one for each NUMA node, open for reading and writing.
        shared: what the host writes goes to the files; else to QEMU's own copy of a page.
    """

    fds: tuple[int, ...]
    shared: bool


def command_line(
    qemu: str,
    vmlinuz: str,
    initrd: str,
    agent_fd: int,
    options: HostOptions,
    ram: Ram | None = None,
    qmp_fd: int | None = None,
    khz: int | None = None,
) -> list[str]:
    """Compose QEMU's arguments; console on its standard output, agent on the socket ``agent_fd``.

    Args:
        qemu, vmlinuz, initrd: paths.
        agent_fd: a connected socket.
        options: what the host is made of.
        ram: files that hold its RAM; where they are not shared, it waits for the state of its devices.
        qmp_fd: a connected socket for QMP.
        khz: the frequency of its time stamp counter, if its kernel is to be told.
    """
    # pit=off: a kernel that has to measure its clock itself goes wrong most with the PIT.
    machine = "q35,usb=off,vmport=off,smm=off,pit=off"
    if ram is not None and options.nodes == 1:
        machine += ",memory-backend=node0"
    argv = [qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    argv += ["-machine", machine, *ACCEL[options.accel], "-smp", "1"]
    if options.plugin:
        argv += ["-plugin", options.plugin]
    argv += ["-m", f"{options.memory >> 10}k", *_memory(options, ram), *options.devices]
    if options.accel == "icount":
        khz = 1_000_000
    told = f" tsc_early_khz={khz}" if khz else ""
    argv += ["-kernel", vmlinuz, "-initrd", initrd, "-append", f"{CMDLINE}{told} {options.cmdline}".strip()]
    argv += ["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]
    # Two ports, of which the first is kept for a console: QEMU's main loop polls two queues for each there might be.
    argv += ["-device", "virtio-serial-pci,max_ports=2", "-chardev", f"socket,id=agent,fd={agent_fd}"]
    argv += ["-device", "virtserialport,chardev=agent,name=offmap.agent"]
    argv += _share("root", Path("/"), "readonly=on")
    # The device is there in any case: hosts with and without an output folder are of one kind. Without one it has
    # nothing that the other does not have.
    argv += _share("out", options.out or Path("/"), "readonly=off" if options.out else "readonly=on")
    if qmp_fd is not None:
        argv += ["-chardev", f"socket,id=qmp,fd={qmp_fd}", "-mon", "chardev=qmp,mode=control"]
    if ram is not None and not ram.shared:
        argv += ["-incoming", "defer"]
    return argv


def qemu_version(program: str) -> str:
    """The first line of what the program says of its version: ``QEMU emulator version 7.2.22 …``."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0]


def node_sizes(options: HostOptions) -> list[int]:
    """Return each NUMA node's share of the RAM in bytes, in whole memory blocks of the smallest size there is."""
    share = options.memory // options.nodes >> 27 << 27
    return [options.memory - share * (options.nodes - 1)] + [share] * (options.nodes - 1)


def _memory(options: HostOptions, ram: Ram | None) -> list[str]:
    if ram is None and options.nodes == 1:
        return []
    argv = []
    for node, size in enumerate(node_sizes(options)):
        what = "memory-backend-ram"
        if ram is not None:
            what = f"memory-backend-file,mem-path=/proc/self/fd/{ram.fds[node]},share={'on' if ram.shared else 'off'}"
        argv += ["-object", f"{what},id=node{node},size={size >> 10}k"]
        if options.nodes > 1:
            argv += ["-numa", f"node,nodeid={node},memdev=node{node}" + (",cpus=0" if node == 0 else "")]
    return argv


def _share(name: str, path: Path, access: str) -> list[str]:
    quoted = str(path).replace(",", ",,")  # QEMU's own way to write a comma
    # security_model=none: files keep the owner they have here, and a chown that we may not do is not an error.
    # multidevs=remap: inode numbers of different file systems below the folder do not collide.
    fsdev = f"local,id={name},path={quoted},security_model=none,multidevs=remap,{access}"
    return ["-fsdev", fsdev, "-device", f"virtio-9p-pci,fsdev={name},mount_tag=offmap-{name}"]
