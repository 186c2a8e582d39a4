"""What a drive gives the guest: `offmap run` against QEMU's microvm, with the same kernel, image file and size.

By turns in one disposable host: ours on `reserved` (hidden) and on `anon`, QEMU on ordinary RAM. The image is on a
tmpfs, so that no disk is measured; the program in the guest (virtio_blk.c) goes past its page cache. The host emulates
its one processor, so all of it is work: the guest's driver, exits, VMM, and the host kernel's copying.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from c_program import static_program
from command import benchmark_parser, exit_status
from figure import Figure, Limit
from lab_runs import GUEST_SIZE, add_inside_options, qemu_argv, run_in_lab
from offmap.errors import OffmapError
from offmap.lab.cpio import char_device, directory, newc, regular
from offmap.lab.initramfs import busybox
from offmap.lab.modules import ModuleIndex, load_module
from offmap.lab.provision import host_kernel

IMAGE_SIZE = 96 << 20
PATTERNS = (
    *("randread:4096:1", "randread:4096:16", "randwrite:4096:1", "randwrite:4096:16"),
    *("seqread:1048576:1", "seqwrite:1048576:1"),
)
LIMIT = Limit("ratio", at_least=0.5)  # of QEMU's throughput
PEER = "qemu-system-x86_64 -M microvm,acpi=on,rtc=on -accel kvm, virtio-blk-device, on ordinary RAM"
COMMAND_LINE = "console=ttyS0 quiet"
DEADLINE = 240.0  # seconds for one guest

INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs none /dev; mount -t proc none /proc
while read -r module; do insmod "/modules/$module"; done </modules/order
sleep {settle}
virtio_blk /dev/vda {seconds} {patterns} | sed 's/^/result /'
grep virtio /proc/interrupts | sed 's/^/interrupts /'
poweroff -f
"""


def guest(seconds: float, patterns: Sequence[str], settle: float = 0.0) -> bytes:
    """An initramfs whose init measures /dev/vda, after `settle` seconds.

    Raises:
        OffmapError: no compiler, busybox, or module.
    """
    kernel = host_kernel()
    names = ModuleIndex.of(kernel.modules).load_order(["virtio_mmio", "virtio_blk"])
    files = {name.rsplit("/", 1)[-1].split(".ko")[0] + ".ko": load_module(kernel.modules / name) for name in names}
    entries = [directory(name) for name in ("bin", "dev", "proc", "modules")]
    entries += [char_device("dev/console", 5, 1), regular("bin/busybox", busybox(), 0o755)]
    entries += [regular("bin/virtio_blk", static_program(Path(__file__).with_suffix(".c")), 0o755)]
    entries += [
        regular("init", INIT.format(seconds=seconds, patterns=" ".join(patterns), settle=settle).encode(), 0o755)
    ]
    entries += [regular(f"modules/{name}", data) for name, data in files.items()]
    entries += [regular("modules/order", "".join(f"{name}\n" for name in files).encode())]
    return newc(entries)


def offmap_command(kernel: str, initrd: str, image: str, memory: str, *more: str) -> list[str]:
    """Our guest."""
    argv = [sys.executable, "-m", "offmap", "run", "--kernel", kernel, "--initrd", initrd, "--cmdline", COMMAND_LINE]
    return [*argv, "--memory", memory, "--memory-size", GUEST_SIZE, "--drive", image, *more]


def qemu_command(kernel: str, initrd: str, image: str, *more: str) -> list[str]:
    """QEMU's, with its drive by the host's page cache as ours is."""
    argv = qemu_argv("microvm,acpi=on,rtc=on")
    argv += ["-global", "virtio-mmio.force-legacy=false"]
    argv += ["-drive", f"id=d,file={image},format=raw,if=none,cache=writeback"]
    argv += [*(more or ("-device", "virtio-blk-device,drive=d"))]
    return [*argv, "-kernel", kernel, "-initrd", initrd, "-append", f"{COMMAND_LINE} pci=off"]


def measure(argv: Sequence[str]) -> Mapping[str, float]:
    """Operations a second of each pattern, and microseconds of the VMM's processor time for each operation.

    Raises:
        OffmapError: the guest did not measure.
    """
    before = os.times()
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=DEADLINE, check=False)
    except subprocess.TimeoutExpired:
        raise OffmapError(f"{argv[0]} did not end within {DEADLINE:.0f} s") from None
    after = os.times()
    results = {}
    for line in done.stdout.decode(errors="replace").splitlines():
        words = line.split()
        if words[:1] == ["result"]:
            results[words[1]] = int(words[2]) / (int(words[3]) / 1e6)
        elif words[:1] == ["interrupts"]:
            print(f"# {line.strip()}", file=sys.stderr)
    if not results:
        last = (done.stdout + done.stderr).decode(errors="replace").strip().splitlines()[-3:]
        raise OffmapError(f"{argv[0]} measured nothing: {' / '.join(last)}")
    user, system = after.children_user - before.children_user, after.children_system - before.children_system
    print(f"# {Path(argv[0]).name} {results} user {user:.1f} system {system:.1f}", file=sys.stderr, flush=True)
    return results


def inside(kernel: str, initrd: str, rounds: int) -> int:
    """Measure, in the disposable host."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "tmpfs", "none", folder], check=True)
        image = Path(folder) / "image"
        with image.open("wb") as file:
            for _ in range(IMAGE_SIZE >> 20):
                file.write(os.urandom(1 << 20))
        who = {
            "reserved": offmap_command(kernel, initrd, str(image), "reserved"),
            "qemu": qemu_command(kernel, initrd, str(image)),
            "anon": offmap_command(kernel, initrd, str(image), "anon"),
        }
        samples: dict[str, list[Mapping[str, float]]] = {name: [] for name in who}
        for _ in range(rounds):
            for name, argv in who.items():
                samples[name].append(measure(argv))
        subprocess.run(["umount", folder], check=True)
    for memory in ("reserved", "anon"):
        for pattern in samples["qemu"][0]:
            ours = [sample[pattern] for sample in samples[memory]]
            peer = [sample[pattern] for sample in samples["qemu"]]
            facts = {"memory": GUEST_SIZE}
            Figure("virtio_blk", f"{pattern}, {memory}", "operations/s", ours, PEER, peer, LIMIT, facts).print()
    return 0


def main() -> int:
    parser = benchmark_parser(__doc__, rounds=3, quick="1 round")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each pattern (default: %(default)s)")
    parser.add_argument("--patterns", default=",".join(PATTERNS), help="PATTERN:BYTES:DEPTH,… (default: %(default)s)")
    add_inside_options(parser)
    args = parser.parse_args()
    rounds = 1 if args.quick else args.rounds

    def run() -> int:
        if args.inside:
            return inside(args.guest_kernel, args.guest_initrd, rounds)
        initrd = guest(args.seconds, args.patterns.split(","))
        return run_in_lab(__file__, ["--rounds", str(rounds)], initrd=initrd)

    return exit_status("virtio_blk", run)


if __name__ == "__main__":
    sys.exit(main())
