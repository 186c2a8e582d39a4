"""A Debian guest from the start of the VMM's process to its login prompt: `offmap run` against QEMU's microvm.

Both run by turns in one disposable host, with the same kernel, initrd, root file system, command line and size: ours on
hidden RAM (`unplugged`) and on plain RAM (`anon`), QEMU on plain RAM. At each login the VMM's own memory is measured:
what is resident of its process beyond the guest's RAM.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from boot_time import COMMAND_LINE, PEER, TUNED_MACHINE, qemu_version, time_to
from command import benchmark_parser, exit_status
from figure import Figure, Limit
from lab_runs import GUEST_SIZE, qemu_argv
from offmap.errors import OffmapError
from offmap.guests.build import build_image
from offmap.guests.recipe import RootRecipe
from offmap.kmod.lab_build import lab_module
from offmap.lab.host import LabHost
from offmap.lab.provision import host_kernel
from offmap.units import parse_size

LOGIN = b" login: "
MAX_VMM_MIB = 45.0
MAX_HIDDEN_RATIO = 1.1
ROOT = "root=/dev/vda offmap.overlay=tmpfs"
_FIELD = re.compile(r"^(Rss|Size|[0-9a-f]+-[0-9a-f]+)\b[: ]+(.*)$", re.MULTILINE)


def own_memory(pid: int, ram: int) -> float:
    """MiB resident of a VMM beyond its guest's RAM: all its mappings, less those as large as the RAM."""
    text = Path(f"/proc/{pid}/smaps").read_text()
    mappings: list[dict[str, int]] = []
    for name, value in _FIELD.findall(text):
        if name in ("Rss", "Size"):
            mappings[-1][name] = int(value.split()[0])
        else:
            mappings.append({"Rss": 0, "Size": 0})
    large = [m for m in mappings if m["Size"] << 10 >= ram]
    if not large:
        raise OffmapError(f"process {pid} has no mapping as large as its guest's RAM")
    return sum(m["Rss"] for m in mappings if m not in large) / 1024


@dataclass
class Contender:
    """One VMM, and what was measured of it."""

    argv: Sequence[str]
    seconds: list[float] = field(default_factory=list)
    mib: list[float] = field(default_factory=list)

    def run(self, keep: bool) -> None:
        """Boot once."""
        mib: list[float] = []
        seconds = time_to(LOGIN, self.argv, lambda pid: mib.append(own_memory(pid, parse_size(GUEST_SIZE))))
        if keep:
            self.seconds.append(seconds)
            self.mib += mib


def offmap_command(image: Path, memory: str, *more: str) -> list[str]:
    """`offmap run` with this image."""
    argv = [sys.executable, "-m", "offmap", "run", "--image", str(image), "--cmdline", COMMAND_LINE]
    return [*argv, "--memory", memory, "--memory-size", GUEST_SIZE, *more]


def qemu_command(image: Path) -> list[str]:
    """QEMU's quickest machine with the same guest: what `offmap run --image` does, in its words."""
    argv = qemu_argv(TUNED_MACHINE)
    argv += ["-drive", f"file={image / 'root.img'},format=raw,readonly=on,if=none,id=root"]
    argv += ["-device", "virtio-blk-device,drive=root", "-kernel", str(image / "vmlinuz")]
    return [*argv, "-initrd", str(image / "initrd.img"), "-append", f"{ROOT} {COMMAND_LINE} pci=off"]


def inside(image: Path, rounds: int) -> int:
    """Measure, in the disposable host."""
    hidden, plain = (Contender(offmap_command(image, memory)) for memory in ("unplugged", "anon"))
    qemu = Contender(qemu_command(image))
    for number in range(rounds + 1):
        for contender in (hidden, qemu, plain):
            contender.run(keep=number > 0)  # the first round fills the page cache for all of them
    facts = {"memory": GUEST_SIZE, "qemu": qemu_version()}
    peer = PEER.format(TUNED_MACHINE)
    name = f"process start to login, {GUEST_SIZE}"
    figures = (
        Figure("boot_login", f"{name}, unplugged", "s", hidden.seconds, peer, qemu.seconds, Limit("ratio", 1.0), facts),
        Figure("boot_login", f"{name}, anon", "s", plain.seconds, peer, qemu.seconds, facts=facts),
        Figure(
            *("boot_login", f"{name}, unplugged against anon", "s", hidden.seconds, "offmap run --memory anon"),
            *(plain.seconds, Limit("ratio", MAX_HIDDEN_RATIO), facts),
        ),
        Figure(
            *("boot_login", "resident beyond the guest's RAM, at the login", "MiB", hidden.mib, peer, qemu.mib),
            *(Limit("ours", MAX_VMM_MIB), facts),
        ),
    )
    for figure in figures:
        figure.print()
    return 0


def run(rounds: int) -> int:
    """Make the image and a host, and measure in it."""
    kernel = host_kernel()
    module = lab_module(kernel)
    with tempfile.TemporaryDirectory() as folder:
        image = build_image(RootRecipe(), kernel, Path(folder) / "image")
        argv = [sys.executable, str(Path(__file__).resolve()), "--inside", str(image.folder), "--rounds", str(rounds)]
        with LabHost.start(kernel, memory="2G") as host:
            if host.run(["insmod", str(module)]) != 0:
                raise OffmapError("the disposable host does not load the module")
            return host.run(argv, timeout=1800.0)


def main() -> int:
    parser = benchmark_parser(__doc__, rounds=5, quick="1 round")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    rounds = 1 if args.quick else args.rounds
    return exit_status("boot_login", lambda: run(rounds) if args.inside is None else inside(args.inside, rounds))


if __name__ == "__main__":
    sys.exit(main())
