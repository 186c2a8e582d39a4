"""QEMU and Firecracker wrapped against the same VMM plain, by turns in one disposable host.

From the start of the VMM's process to the guest's init, on `unplugged` and on a pool, and of `offmap run` with
Firecracker's guest; and the processor time that these took meanwhile, of the VMM, the supervisor and an audit that has
begun, which says more on a busy machine. Then, of a QEMU whose audit has said its word: the memory of the supervisor
(PSS), and how often it wakes up while nothing happens. Last, the guest's reads and writes of a QEMU's virtio-blk drive,
and one TCP stream to it and from it.
"""

import compileall
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import virtio_blk
import virtio_net
from boot_time import COMMAND_LINE, TUNED_MACHINE, offmap_command, qemu_command, time_to
from c_program import compile_program
from command import benchmark_parser, exit_status
from figure import Figure, Limit
from lab_runs import add_icount_option, add_inside_options, run_in_lab
from offmap.boot.packed import unpacked
from offmap.compare.guest import READY
from offmap.errors import OffmapError
from offmap.kmod.lab_build import lab_module
from offmap.kvm import Kvm
from offmap.lab.firecracker import released_firecracker
from offmap.lab.provision import host_kernel

ROOT = Path(__file__).resolve().parents[1]
SOURCE = Path("/run/source")  # in the disposable host: the package as pip installs it, with its byte code
POOL = Path("/run/hidden")
MAX_RATIO = 1.1
MAX_MIB = 10.0
LEAST_BLOCK, MOST_BLOCK = 0.97, 1.03  # of the network as well
NET_MB = 30  # of one stream
IDLE = 10.0  # seconds
AUDITED = 30.0  # seconds after a boot: until then the first audit uses the host's only processor too
VERDICT = re.compile(rb"offmap wrap: process \d+: (HIDDEN|EXPOSED|placed, not audited)")


def wrapped(argv: Sequence[str], memory: str) -> list[str]:
    """`argv` under `offmap wrap`."""
    return [sys.executable, "-m", "offmap", "wrap", "--memory", memory, "--", *argv]


def told(argv: list[str]) -> list[str]:
    """QEMU's command, its guest told the frequency of the TSC, which a microvm without kvm-clock cannot measure."""
    with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        return [*argv[:-1], f"{argv[-1]} tsc=reliable tsc_early_khz={vcpu.tsc_khz()}"]


def firecracker_command(binary: str, vmlinux: str, initrd: str, folder: Path) -> list[str]:
    """Firecracker with 256 MiB and this guest."""
    words = f"{COMMAND_LINE} reboot=k panic=1 pci=off i8042.noaux i8042.nomux i8042.dumbkbd"
    source = {"kernel_image_path": vmlinux, "initrd_path": initrd, "boot_args": words}
    machine = {"vcpu_count": 1, "mem_size_mib": 256}
    (folder / "config.json").write_text(json.dumps({"boot-source": source, "drives": [], "machine-config": machine}))
    # By default its log comes in the middle of its guest's lines. It does not make the file.
    (log := folder / "log").touch()
    return [binary, "--log-path", str(log), "--no-api", "--config-file", str(folder / "config.json")]


def supervisors(*words: bytes) -> list[int]:
    """Those of this host, and processes that have one of these words on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if {b"offmap wrap", *words} & set(path.read_bytes().split(b"\0")):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def processor_seconds(vmm: int) -> float:
    """How long a VMM, its supervisor and its audit have run, user and system, to a hundredth of a second."""
    ticks = 0
    for pid in (vmm, *supervisors(b"offmap.wrap.judge")):
        with suppress(FileNotFoundError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(int(fields[n]) for n in (11, 12, 13, 14))  # utime, stime, and of children: proc(5)
    return ticks / os.sysconf("SC_CLK_TCK")


def _note_processor_time(samples: list[float], vmm: int) -> None:
    samples.append(processor_seconds(vmm))


def number(pid: int, file: str, name: str) -> int:
    """The number after this name in a file of /proc/PID."""
    match = re.search(rf"^{name}:\s+(\d+)", Path(f"/proc/{pid}/{file}").read_text(), re.MULTILINE)
    if match is None:
        raise OffmapError(f"process {pid} has no {name}")
    return int(match[1])


@contextmanager
def audited(argv: Sequence[str]) -> Iterator[int]:
    """The supervisor of a wrapped VMM that has been audited, with nothing more to do."""
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            for line in process.stderr or ():
                if VERDICT.search(line):
                    break
            else:
                raise OffmapError("the wrapped VMM ended without a verdict")
            while len(found := supervisors(b"offmap.wrap.judge")) > 1:
                time.sleep(0.1)  # it is reaped after it has said its word
            yield found[0]
        finally:
            process.kill()


def inside(rounds: int, module: str, firecracker: str, vmlinux: str, kernel: str, initrd: str) -> int:
    """Measure, in the disposable host."""
    subprocess.run(["insmod", module], check=True)
    shutil.copytree(ROOT / "src" / "offmap", SOURCE / "offmap", ignore=shutil.ignore_patterns("__pycache__"))
    compileall.compile_dir(SOURCE, quiet=1)
    os.environ |= {"PYTHONPATH": str(SOURCE)}
    create = [sys.executable, "-m", "offmap", "pool", "create", "1G", "--path", str(POOL), "--allow-nested"]
    subprocess.run(create, check=True)
    with tempfile.TemporaryDirectory() as folder:
        here = [shutil.copy(file, folder) for file in (vmlinux, initrd)]
        vmms = {
            "QEMU": told(qemu_command(kernel, initrd, TUNED_MACHINE)),
            "Firecracker": firecracker_command(firecracker, here[0], here[1], Path(folder)),
        }
        for name, plain in vmms.items():
            commands = {"plain": plain, **{memory: wrapped(plain, memory) for memory in ("unplugged", "pool")}}
            if name == "Firecracker":
                commands["ours"] = offmap_command(here[0], here[1], "unplugged")
            samples: dict[str, list[float]] = {command: [] for command in commands}
            busy: dict[str, list[float]] = {command: [] for command in commands}
            for count in range(rounds + 1):
                for command, argv in commands.items():
                    # The first round fills the page cache for all of them.
                    kept = busy[command] if count else []
                    taken = time_to(READY.encode(), argv, partial(_note_processor_time, kept))
                    if count:
                        samples[command].append(taken)
            for memory, limit in (("pool", Limit("ratio", MAX_RATIO)), ("unplugged", None)):
                title = f"{name} wrapped, process start to init, 256M, {memory}"
                Figure("wrap", title, "s", samples[memory], f"{name} plain", samples["plain"], limit).print()
                title = f"{name} wrapped, processor time until then, {memory}"
                Figure("wrap", title, "s", busy[memory], f"{name} plain", busy["plain"]).print()
            if ours := samples.get("ours"):
                title = "offmap run, process start to init, 256M, unplugged"
                Figure("wrap", title, "s", ours, f"{name} plain", samples["plain"], Limit("ratio", MAX_RATIO)).print()
        with audited(wrapped(vmms["QEMU"], "pool")) as pid:
            switches = ("voluntary_ctxt_switches", "nonvoluntary_ctxt_switches")
            before = [number(pid, "status", name) for name in switches]
            time.sleep(IDLE)  # what is measured is that nothing happens
            woken = sum(number(pid, "status", name) for name in switches) - sum(before)
            mib = number(pid, "smaps_rollup", "Pss") / 1024
            facts = {"rss_mib": number(pid, "smaps_rollup", "Rss") / 1024}
        Figure("wrap", "PSS of an idle supervisor", "MiB", [mib], limit=Limit("ours", MAX_MIB), facts=facts).print()
        Figure("wrap", f"its wake-ups in {IDLE:.0f} s", "", [woken], limit=Limit("ours", 0)).print()
    return 0


def inside_block(rounds: int, module: str, kernel: str, initrd: str) -> int:
    """Measure a drive, in another disposable host, whose guest does nothing else."""
    subprocess.run(["insmod", module], check=True)
    with tempfile.TemporaryDirectory(dir="/run") as folder:
        image = Path(folder) / "image"
        image.write_bytes(os.urandom(virtio_blk.IMAGE_SIZE))
        plain = told(virtio_blk.qemu_command(kernel, initrd, str(image)))
        who = {"wrapped": wrapped(plain, "unplugged"), "plain": plain}
        samples: dict[str, list[Mapping[str, float]]] = {name: [] for name in who}
        for _ in range(rounds):
            for name, argv in who.items():
                samples[name].append(virtio_blk.measure(argv))
    for pattern in samples["plain"][0]:
        ours, peer = ([sample[pattern] for sample in samples[name]] for name in ("wrapped", "plain"))
        limit = Limit("ratio", MOST_BLOCK, at_least=LEAST_BLOCK)
        Figure("wrap", f"virtio-blk, {pattern}, wrapped", "operations/s", ours, "QEMU plain", peer, limit).print()
    return 0


def inside_net(rounds: int, module: str, kernel: str, initrd: str) -> int:
    """Measure a network card, in a third one."""
    subprocess.run(["insmod", module], check=True)
    virtio_net.make_tap()
    size, letters = NET_MB * 1_000_000, "ud" * 4
    words = virtio_net.command_line(size, letters, int(AUDITED))
    plain = told(virtio_net.qemu_command(kernel, initrd, words, "off"))
    who = {"wrapped": wrapped(plain, "unplugged"), "plain": plain}
    samples: dict[str, dict[str, list[float]]] = {name: {letter: [] for letter in "ud"} for name in who}
    with tempfile.TemporaryDirectory() as folder:
        program = compile_program(ROOT / "benchmarks" / "virtio_net.c", Path(folder), "-static")
        for _ in range(rounds):
            for name, argv in who.items():
                for letter, rates in virtio_net.measure(argv, program, size, letters).items():
                    samples[name][letter] += rates
    for letter, direction in virtio_net.DIRECTIONS.items():
        ours, peer = (samples[name][letter] for name in ("wrapped", "plain"))
        limit = Limit("ratio", MOST_BLOCK, at_least=LEAST_BLOCK)
        Figure("wrap", f"TCP {direction}, wrapped", "MB/s", ours, "QEMU plain", peer, limit).print()
    return 0


def main() -> int:
    parser = benchmark_parser(__doc__, rounds=5, quick="one round")
    add_inside_options(parser, "--module", "--vmlinux")
    add_icount_option(parser)
    parser.add_argument("--only", choices=("start", "block", "net"), help="measure nothing else")
    parser.add_argument("--firecracker", default="", metavar="PATH", help="instead of the released one that is fetched")
    args = parser.parse_args()
    if args.inside and args.only != "start":
        devices = {"block": inside_block, "net": inside_net}[args.only]
        return exit_status("wrap", partial(devices, args.rounds, args.module, args.guest_kernel, args.guest_initrd))
    if args.inside:
        files = (args.firecracker, args.vmlinux, args.guest_kernel, args.guest_initrd)
        return exit_status("wrap", partial(inside, args.rounds, args.module, *files))

    def run() -> int:
        kernel = host_kernel()
        with tempfile.TemporaryDirectory() as folder:
            vmlinux = Path(folder) / "vmlinux"
            vmlinux.write_bytes(unpacked(kernel.vmlinuz))
            common = ["--rounds", str(1 if args.quick else args.rounds), "--module", str(lab_module(kernel))]
            arguments = [
                *common,
                "--vmlinux",
                str(vmlinux),
                "--firecracker",
                args.firecracker or str(released_firecracker()),
            ]
            guests = {
                "block": lambda: virtio_blk.guest(1.0, virtio_blk.PATTERNS, AUDITED),
                "net": virtio_net.guest,
            }
            status = 0
            if args.only in {None, "start"}:
                status = run_in_lab(
                    __file__, [*arguments, "--only", "start"], memory="4G", timeout=1800.0, icount=args.icount
                )
        for what, guest in guests.items():
            if not status and args.only in {None, what}:
                status = run_in_lab(__file__, [*common, "--only", what], initrd=guest(), icount=args.icount)
        return status

    return exit_status("wrap", run)


if __name__ == "__main__":
    sys.exit(main())
