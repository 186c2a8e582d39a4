"""One TCP stream between guest and host over a tap: `offmap run` against QEMU's microvm, same kernel, initrd and tap.

By turns in one disposable host: QEMU with its virtio-net in user space (vhost=off) and ordinary RAM; ours in user space
on `anon` and on `reserved`, and with vhost on `reserved`. The other end, in the host, is the same program as the
guest's (virtio_net.c). The host emulates its one processor, so all of it is work: both TCP stacks, the guest's driver,
exits, VMM, and the host kernel's copying. Each guest runs both directions several times; the first of each is left out.
"""

import fcntl
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Interface
from pathlib import Path

from c_program import compile_program, static_program
from command import benchmark_parser, exit_status
from figure import Figure, Limit
from lab_runs import GUEST_SIZE, add_inside_options, qemu_argv, run_in_lab
from offmap.devices.virtio.tap import open_tap
from offmap.errors import OffmapError
from offmap.lab.cpio import char_device, directory, newc, regular
from offmap.lab.modules import ModuleIndex, load_module
from offmap.lab.provision import host_kernel
from offmap.uapi.if_tun import TUNSETPERSIST

PEER = "qemu-system-x86_64 -M microvm,acpi=on,rtc=on -accel kvm, virtio-net-device, tap, vhost=off, on ordinary RAM"
LIMIT = Limit("ratio", at_least=0.5)  # of QEMU's throughput
HOST, GUEST, PORT = IPv4Interface("198.18.0.1/24"), "198.18.0.2", 5999
TAP = "offbench0"
DEADLINE = 240.0  # seconds for one guest
DIRECTIONS = {"u": "guest to host", "d": "host to guest"}


def guest() -> bytes:
    """An initramfs whose init is the program.

    Raises:
        OffmapError: no compiler, or no such module.
    """
    kernel = host_kernel()
    names = ModuleIndex.of(kernel.modules).load_order(["virtio_mmio", "virtio_net"])
    files = {name.rsplit("/", 1)[-1].split(".ko")[0] + ".ko": load_module(kernel.modules / name) for name in names}
    entries = [directory("dev"), directory("modules"), char_device("dev/console", 5, 1)]
    entries += [regular("init", static_program(Path(__file__).with_suffix(".c")), 0o755)]
    entries += [regular(f"modules/{name}", data) for name, data in files.items()]
    entries += [regular("modules/order", "".join(f"{name}\n" for name in files).encode())]
    return newc(entries)


def command_line(size: int, letters: str, settle: int = 0) -> str:
    """What the guest's init is told, as words that its kernel does not know.

    Args:
        settle: seconds that it waits before it begins.
    """
    words = {"SETTLE": settle, "ADDRESS": GUEST, "HOST": str(HOST.ip), "PORT": PORT, "BYTES": size, "LETTERS": letters}
    return "console=ttyS0 quiet " + " ".join(f"OFFMAP_{name}={value}" for name, value in words.items())


def offmap_command(kernel: str, initrd: str, words: str, memory: str, net: str) -> list[str]:
    """Our guest."""
    argv = [sys.executable, "-m", "offmap", "run", "--kernel", kernel, "--initrd", initrd, "--cmdline", words]
    return [*argv, "--memory", memory, "--memory-size", GUEST_SIZE, "--net", net]


def qemu_command(kernel: str, initrd: str, words: str, vhost: str) -> list[str]:
    """QEMU's."""
    argv = qemu_argv("microvm,acpi=on,rtc=on")
    argv += ["-global", "virtio-mmio.force-legacy=false"]
    argv += ["-netdev", f"tap,id=n,ifname={TAP},script=no,downscript=no,vhost={vhost}"]
    argv += ["-device", "virtio-net-device,netdev=n"]
    return [*argv, "-kernel", kernel, "-initrd", initrd, "-append", f"{words} pci=off"]


def measure(argv: Sequence[str], program: Path, size: int, letters: str) -> Mapping[str, list[float]]:
    """MB/s by direction, but for the first of each.

    Raises:
        OffmapError: the guest did not finish.
    """
    serve = [str(program), "serve", str(PORT), str(size), str(len(letters))]
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as server:
        try:
            if server.stdout is None or server.stdout.readline() != "ready\n":
                raise OffmapError("the host's end of the stream cannot listen", f"free port {PORT}")
            with subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            ) as vmm:
                try:
                    server.wait(DEADLINE)
                    busy = threads(vmm.pid)  # the guest has yet to power off
                    said, _ = vmm.communicate(timeout=DEADLINE)
                finally:
                    vmm.kill()
            if "offmap-benchmark: done" not in said:
                raise OffmapError(f"{argv[0]} did not finish: {' / '.join(said.strip().splitlines()[-3:])}")
            results: dict[str, list[float]] = {letter: [] for letter in DIRECTIONS}
            for letter, seconds in re.findall(r"^(\w) ([\d.]+)$", server.stdout.read(), re.M):
                results[letter].append(size / 1e6 / float(seconds))
        except subprocess.TimeoutExpired:
            raise OffmapError(f"{argv[0]} did not end within {DEADLINE:.0f} s") from None
        finally:
            server.kill()
    rates = {DIRECTIONS[letter]: [round(rate, 1) for rate in found] for letter, found in results.items()}
    print(f"# {Path(argv[0]).name} {rates} MB/s; {busy}", file=sys.stderr, flush=True)
    return {letter: found[1:] for letter, found in results.items()}


def threads(pid: int) -> str:
    """Where a VMM's processor time went: seconds of each thread, in the order in which they were started.

    Of ours: the main thread, the network card's (user: Python; system: moving packets through the tap), and the vCPU's,
    whose user time is the guest's.
    """
    found = []
    for task in sorted(Path(f"/proc/{pid}/task").iterdir(), key=lambda task: int(task.name)):
        try:
            stat = (task / "stat").read_text()
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
        name, fields = stat[stat.index("(") + 1 : stat.rindex(")")], stat[stat.rindex(")") + 2 :].split()
        user, system = (int(fields[n]) / os.sysconf("SC_CLK_TCK") for n in (11, 12))  # utime, stime: proc(5)
        if user + system >= 0.1:
            found.append(f"{name} user {user:.1f} s, system {system:.1f} s")
    return "; ".join(found)


def make_tap() -> None:
    """A tap for all of them, up and with the host's address, until this disposable host is gone."""
    subprocess.run(["modprobe", "-a", "tun", "vhost_net"], check=True, env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"})
    with open_tap(TAP, address=HOST) as tap:
        fcntl.ioctl(tap.fd, TUNSETPERSIST, 1)


def inside(kernel: str, initrd: str, rounds: int, mb: int) -> int:
    """Measure, in the disposable host."""
    size, letters = mb * 1_000_000, "ud" * 4
    words = command_line(size, letters)
    make_tap()
    who = {
        "qemu": qemu_command(kernel, initrd, words, "off"),
        "anon": offmap_command(kernel, initrd, words, "anon", f"tap={TAP}"),
        "reserved": offmap_command(kernel, initrd, words, "reserved", f"tap={TAP}"),
        "reserved, vhost=on": offmap_command(kernel, initrd, words, "reserved", f"tap={TAP},vhost=on"),
    }
    samples: dict[str, dict[str, list[float]]] = {name: {letter: [] for letter in DIRECTIONS} for name in who}
    with tempfile.TemporaryDirectory() as folder:
        program = compile_program(Path(__file__).with_suffix(".c"), Path(folder), "-static")
        for _ in range(rounds):
            for name, argv in who.items():
                for letter, rates in measure(argv, program, size, letters).items():
                    samples[name][letter] += rates
    for name in who:
        if name == "qemu":
            continue
        for letter, direction in DIRECTIONS.items():
            ours, peer = samples[name][letter], samples["qemu"][letter]
            facts = {"memory": GUEST_SIZE, "stream_mb": mb}
            Figure("virtio_net", f"TCP {direction}, {name}", "MB/s", ours, PEER, peer, LIMIT, facts).print()
    return 0


def main() -> int:
    parser = benchmark_parser(__doc__, rounds=3, quick="1 round of 30 MB")
    parser.add_argument("--megabytes", type=int, default=100, metavar="N", help="of one stream (default: %(default)s)")
    add_inside_options(parser)
    args = parser.parse_args()
    rounds, mb = (1, 30) if args.quick else (args.rounds, args.megabytes)

    def run() -> int:
        if args.inside:
            return inside(args.guest_kernel, args.guest_initrd, rounds, mb)
        return run_in_lab(__file__, ["--rounds", str(rounds), "--megabytes", str(mb)], initrd=guest())

    return exit_status("virtio_net", run)


if __name__ == "__main__":
    sys.exit(main())
