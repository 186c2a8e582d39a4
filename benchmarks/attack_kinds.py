"""The attack on every kind of RAM and VMM at hand, each beside a plain guest: where it ends, and what is swept.

In a disposable host, through kcore, with the small guest and its planted secret (tests/lab/attack_target.py). Plain
kinds must be recovered in 200,000 reads. On hidden ones the chain must end, and no 16 bytes of the secret may stand in
anything that the host kernel maps. ``--host-kernel patched:7.3`` has the kinds that need our patches.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from command import benchmark_parser, exit_status
from figure import Figure, Limit
from lab_runs import add_inside_options, run_in_lab
from offmap.boot.packed import unpacked
from offmap.compare.knowledge import knowledge_of
from offmap.errors import OffmapError
from offmap.kmod.lab_build import lab_module
from offmap.lab.firecracker import released_firecracker
from offmap.lab.kernel import HostKernel
from offmap.lab.provision import default_spec, host_kernel
from offmap.patience import scaled

ROOT = Path(__file__).parents[1]
MOST_READS = 200_000
PLAIN = ("memfd", "hugetlb", "qemu-anon", "qemu-memfd")
SINCE_6_18 = "guest_memfd"
BRIDGE = "secretmem-bridge"
PATCHED = ("guest_memfd-unmapped", "secretmem")
HIDDEN = (
    *PATCHED,
    "reserved",
    "unplugged",
    BRIDGE,
    "pool",
    "qemu-unplugged",
    "qemu-pool",
    "wrapped-qemu",
    "wrapped-firecracker",
    "wrapped-firecracker-pool",
)


def check(kind: str, result: dict[str, Any]) -> None:
    """Print the figures of one kind.

    Raises:
        OffmapError: it did not come out as it should.
    """
    hidden, attempt = kind.removesuffix(", kcore") in HIDDEN, result["attempt"]
    expected = "ends" if hidden else "recovered"
    if result["outcome"] != expected:
        raise OffmapError(f"{kind}: {result['outcome']} and not {expected}: {result['reason']}")
    facts = {"outcome": result["outcome"], "stage": attempt["stage"], "mapped_pages": attempt["mapped_pages"]}
    limit = Limit("ours", MOST_READS) if expected == "recovered" else None
    Figure("attack_kinds", f"planted secret, {kind}", "reads", [attempt["reads"]], limit=limit, facts=facts).print()
    if sweep := attempt["sweep"]:
        most = Limit("ours", 0)
        facts = {key: sweep[key] for key in ("bytes_read", "pages_unread", "device_pages")}
        Figure("attack_kinds", f"longest run, {kind}", "bytes", [sweep["longest"]], limit=most, facts=facts).print()
    if hidden:
        sizes = {each["name"]: each["bytes"] for each in attempt["residues"]}
        Figure("attack_kinds", f"residues, {kind}", "bytes", [sum(sizes.values())], facts=sizes).print()


def kinds_on(kernel: HostKernel) -> tuple[str, ...]:
    """The kinds that a host with this kernel has."""
    if kernel.name.startswith("patched:"):
        return (SINCE_6_18, *PATCHED)
    newer = tuple(map(int, kernel.release.split(".")[:2])) >= (6, 18)
    others = (kind for kind in HIDDEN if kind not in PATCHED)
    return (*PLAIN, *([SINCE_6_18] if newer else []), *others)


def inside(job: Path, modules: list[str], kinds: list[str]) -> int:
    """Measure, in the disposable host."""
    for module in modules:
        subprocess.run(["insmod", module], check=True)
    how = (kind + ("=" if kind in HIDDEN else "") + ("" if kind == BRIDGE else "%") for kind in kinds)
    argv = [sys.executable, "-m", "tests.lab.attack_target", str(job), *how]
    done = subprocess.run(argv, check=False, stdout=subprocess.PIPE, cwd=ROOT)
    if done.returncode:
        raise OffmapError("the attacks failed", "see above")
    for kind, result in json.loads(done.stdout).items():
        check(kind, result)
    return 0


def main() -> int:
    parser = benchmark_parser(__doc__, rounds=1, quick="the same: the reads are counted, not timed")
    parser.add_argument(
        "--host-kernel", default="debian:6.12", help="of the host and the guests (default: %(default)s)"
    )
    every = (*PLAIN, SINCE_6_18, *HIDDEN)  # guests of a patched host have the default
    parser.add_argument("--kind", action="append", choices=every, help="only this one; can be given again")
    add_inside_options(parser, "--learnt", "--learnt-guest", "--modules", "--guest", "--vmlinux", "--firecracker")
    args = parser.parse_args()

    def run() -> int:
        sys.path.append(str(ROOT))
        from tests.lab.alias_module import peek_module  # this script's own folder is all that is on the path

        if args.inside:
            boot = {"kernel": args.guest, "initrd": args.guest_initrd}
            if args.firecracker:
                boot |= {"vmlinux": args.vmlinux, "firecracker": args.firecracker}
            with tempfile.TemporaryDirectory() as folder:
                job = Path(folder) / "job.json"
                known = {"learnt": args.learnt, "learnt_guest": args.learnt_guest}
                job.write_text(json.dumps({"boot": boot, **known, "drives": {}}))
                return inside(job, args.modules.split(","), args.kind)
        kernel = guest = host_kernel(args.host_kernel)
        if patched := kernel.name.startswith("patched:"):
            guest = host_kernel(default_spec())
        with tempfile.TemporaryDirectory() as folder:
            modules = [lab_module(kernel), *([] if patched else [peek_module(kernel)])]
            more = ["--modules", ",".join(map(str, modules)), "--guest", str(guest.vmlinuz)]
            for option, one in (("--learnt", kernel), ("--learnt-guest", guest)):
                learnt = Path(folder) / f"{option[2:]}.json"
                learnt.write_bytes(knowledge_of(one))
                more += [option, str(learnt)]
            kinds = args.kind or kinds_on(kernel)
            more += [f"--kind={kind}" for kind in kinds]
            if any("firecracker" in kind for kind in kinds):
                vmlinux = Path(folder) / "vmlinux"
                vmlinux.write_bytes(unpacked(guest.vmlinuz))
                more += ["--vmlinux", str(vmlinux), "--firecracker", str(released_firecracker())]
            return run_in_lab(__file__, more, kernel=kernel, timeout=scaled(900.0))

    return exit_status("attack_kinds", run)


if __name__ == "__main__":
    sys.exit(main())
