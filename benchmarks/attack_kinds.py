"""The attack on every kind of RAM and VMM at hand, each beside a plain guest: where it ends, and what is swept.

In a disposable host, through kcore, with the small guest and its planted secret (tests/lab/attack_target.py). Plain
kinds must be recovered in 200,000 reads. On hidden ones the chain must end, and no 16 bytes of the secret may stand in
anything that the host kernel maps.
"""

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from command import benchmark_parser, exit_status
from figure import Figure, Limit
from lab_runs import add_inside_options, run_in_lab
from offmap.attack.knowledge import learn
from offmap.errors import OffmapError
from offmap.kmod.lab_build import lab_module
from offmap.lab.provision import host_kernel
from offmap.patience import scaled

ROOT = Path(__file__).parents[1]
MOST_READS = 200_000
PLAIN = ("memfd", "hugetlb", "qemu-anon", "qemu-memfd")
SINCE_6_18 = "guest_memfd"
BRIDGE = "secretmem-bridge"
HIDDEN = (
    "reserved",
    "unplugged",
    BRIDGE,
    "pool",
    "qemu-unplugged",
    "qemu-pool",
    "wrapped-qemu",
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
    every = (*PLAIN, SINCE_6_18, *HIDDEN)
    parser.add_argument("--kind", action="append", choices=every, help="only this one; can be given again")
    add_inside_options(parser, "--learnt", "--modules", "--guest")
    args = parser.parse_args()

    def run() -> int:
        sys.path.append(str(ROOT))
        from tests.lab.alias_module import peek_module  # this script's own folder is all that is on the path

        if args.inside:
            boot = {"kernel": args.guest, "initrd": args.guest_initrd}
            newer = tuple(map(int, platform.release().split(".")[:2])) >= (6, 18)
            with tempfile.TemporaryDirectory() as folder:
                job = Path(folder) / "job.json"
                job.write_text(json.dumps({"boot": boot, "learnt": args.learnt, "drives": {}}))
                kinds = args.kind or [kind for kind in every if newer or kind != SINCE_6_18]
                return inside(job, args.modules.split(","), kinds)
        kernel = host_kernel(args.host_kernel)
        with tempfile.TemporaryDirectory() as folder:
            learnt = Path(folder) / "learnt.json"
            learnt.write_text(json.dumps(learn(kernel.vmlinuz, sorted(kernel.modules.rglob("kvm.ko*"))).to_json()))
            modules = ",".join(str(make(kernel)) for make in (lab_module, peek_module))
            more = ["--learnt", str(learnt), "--modules", modules, "--guest", str(kernel.vmlinuz)]
            more += [f"--kind={kind}" for kind in args.kind or ()]
            return run_in_lab(__file__, more, kernel=kernel, timeout=scaled(900.0))

    return exit_status("attack_kinds", run)


if __name__ == "__main__":
    sys.exit(main())
