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
HIDDEN = (
    "reserved",
    "unplugged",
    "secretmem-bridge",
    "pool",
    "qemu-unplugged",
    "qemu-pool",
    "wrapped-qemu",
)


def check(kind: str, result: dict[str, Any], hidden: bool) -> None:
    """Print the figures of one kind.

    Raises:
        OffmapError: it did not come out as it should.
    """
    expected, attempt = "ends" if hidden else "recovered", result["attempt"]
    if result["outcome"] != expected:
        raise OffmapError(f"{kind}: {result['outcome']} and not {expected}: {result['reason']}")
    facts = {"outcome": result["outcome"], "stage": attempt["stage"], "mapped_pages": attempt["mapped_pages"]}
    limit = None if hidden else Limit("ours", MOST_READS)
    Figure("attack_kinds", f"planted secret, {kind}", "reads", [attempt["reads"]], limit=limit, facts=facts).print()
    if hidden:
        sweep = attempt["sweep"]
        most = Limit("ours", 0)
        facts = {key: sweep[key] for key in ("bytes_read", "pages_unread", "device_pages")}
        Figure("attack_kinds", f"longest run, {kind}", "bytes", [sweep["longest"]], limit=most, facts=facts).print()


def inside(job: Path, module: Path, plain: list[str]) -> int:
    """Measure, in the disposable host."""
    subprocess.run(["insmod", str(module)], check=True)
    kinds = [*(f"{kind}%" for kind in plain), *(f"{kind}=%" for kind in HIDDEN)]
    argv = [sys.executable, "-m", "tests.lab.attack_target", str(job), *kinds]
    done = subprocess.run(argv, check=False, stdout=subprocess.PIPE, cwd=ROOT)
    if done.returncode:
        raise OffmapError("the attacks failed", "see above")
    for kind, result in json.loads(done.stdout).items():
        check(kind, result, kind in HIDDEN)
    return 0


def main() -> int:
    parser = benchmark_parser(__doc__, rounds=1, quick="the same: the reads are counted, not timed")
    parser.add_argument(
        "--host-kernel", default="debian:6.12", help="of the host and the guests (default: %(default)s)"
    )
    add_inside_options(parser, "--learnt", "--module", "--guest")
    args = parser.parse_args()

    def run() -> int:
        if args.inside:
            boot = {"kernel": args.guest, "initrd": args.guest_initrd}
            newer = tuple(map(int, platform.release().split(".")[:2])) >= (6, 18)
            with tempfile.TemporaryDirectory() as folder:
                job = Path(folder) / "job.json"
                job.write_text(json.dumps({"boot": boot, "learnt": args.learnt, "drives": {}}))
                return inside(job, Path(args.module), [*PLAIN, *([SINCE_6_18] if newer else [])])
        kernel = host_kernel(args.host_kernel)
        with tempfile.TemporaryDirectory() as folder:
            learnt = Path(folder) / "learnt.json"
            learnt.write_text(json.dumps(learn(kernel.vmlinuz, sorted(kernel.modules.rglob("kvm.ko*"))).to_json()))
            more = ["--learnt", str(learnt), "--module", str(lab_module(kernel)), "--guest", str(kernel.vmlinuz)]
            return run_in_lab(__file__, more, kernel=kernel, timeout=scaled(900.0))

    return exit_status("attack_kinds", run)


if __name__ == "__main__":
    sys.exit(main())
