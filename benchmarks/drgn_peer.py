"""A whole VM judged by our walk, beside asking drgn for every page of it.

In a disposable host, a guest of 1 GiB runs on `reserved` memory, so that it has all its pages. Ours is a whole audit
(``audit_process``: finding the RAM and its frames, the walk, the join, who shares it). The peer asks drgn, for each
page, what a script with drgn would: the frame behind it in the VMM's page tables, whether that is in the direct map,
and whether it is in the kernel image. That is less than the audit answers: an alias anywhere else is not seen. It is
asked for a random sample of pages, and the time for all is extrapolated from that, in proportion.
"""

import random
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from command import benchmark_parser, exit_status
from figure import Figure, Limit
from lab_runs import add_inside_options, run_in_lab
from offmap.audit.audit import audit_process
from offmap.audit.btf import Btf, Unknown
from offmap.audit.drgn_kernel import DrgnKernel
from offmap.audit.kcore import Kcore
from offmap.audit.kernel_objects import KernelObjects
from offmap.audit.regions import Layout
from offmap.audit.verdict import Verdict
from offmap.audit.vmcoreinfo import START_KERNEL_MAP
from offmap.compare.guest import READY
from offmap.compare.kinds import kind_of
from offmap.compare.vm_process import VmProcess
from offmap.compare.vmm_command import GuestSetup, vmm_command
from offmap.errors import OffmapError, Undetermined
from offmap.uapi.page import PAGE_SIZE

PAGE = 4096
MAX_RATIO = 0.01
_SIZE = 1 << 30
_HOST = "6G"
_RESERVED = "memmap=1G$0x100000000"  # the first RAM above 4 GiB
_BOOT_SECONDS = 180.0


def ask_drgn(pid: int, first: int, pages: int, sample: int) -> tuple[float, int]:
    """Ask for ``sample`` pages from address ``first`` on; (seconds for one, how many are mapped in the kernel).

    Raises:
        OffmapError: drgn is not installed, or cannot tell.
    """
    oracle = DrgnKernel()
    with Kcore() as kcore:
        info = kcore.vmcoreinfo
        layout = Layout.of(info, kcore.page_offset_base, kcore.segments)
        try:
            pgd = KernelObjects(kcore, layout, Btf.of_host()).page_table_of(pid)
        except Unknown as error:
            raise Undetermined(f"the page tables of process {pid} cannot be found: {error}") from None
        base = kcore.page_offset_base
    chosen = random.Random(1).sample(range(pages), min(sample, pages))
    mapped = 0
    started = time.monotonic()
    for index in chosen:
        pa = oracle.process(pgd, first + index * PAGE)
        if pa is not None:
            image = START_KERNEL_MAP + pa - info.phys_base
            inside = START_KERNEL_MAP <= image < START_KERNEL_MAP + info.kernel_image_size
            mapped += oracle.kernel(base + pa) == pa or (inside and oracle.kernel(image) == pa)
    return (time.monotonic() - started) / len(chosen), mapped


def inside(kernel: str, initrd: str, rounds: int, sample: int) -> int:
    """Measure, in the disposable host."""
    ours, peer = [], []
    with tempfile.TemporaryDirectory() as folder:
        setup = GuestSetup(kind_of("reserved"), Path(kernel), Path(initrd), _SIZE)
        with VmProcess(vmm_command(setup, Path(folder)), Path(folder)) as vm:
            if READY.encode() not in vm.wait_for(re.compile(re.escape(READY)), _BOOT_SECONDS).encode():
                raise OffmapError(f"the guest did not boot: {vm.complaint()}")
            for _ in range(rounds):
                started = time.monotonic()
                result = audit_process(vm.pid)
                ours.append(time.monotonic() - started)
                whole = max(result.ranges, key=lambda part: part.bytes)
                each, mapped = ask_drgn(vm.pid, whole.va, whole.bytes // PAGE_SIZE, sample)
                peer.append(each * result.pages.ram_pages)
                if result.verdict is not Verdict.HIDDEN or mapped:
                    raise OffmapError(f"the two disagree, or the VM is not hidden: {result.verdict}, drgn: {mapped}")
    facts = {
        "ram_pages": result.pages.ram_pages,
        "asked_pages": sample,
        "extrapolated": True,
        "ours_times_faster": round(float(np.median(peer) / np.median(ours)), 1),
    }
    peer_is = "drgn, three translations for each page (extrapolated from a sample)"
    Figure(
        "drgn_peer", f"audit of a {_SIZE >> 30}G VM", "s", ours, peer_is, peer, Limit("ratio", MAX_RATIO), facts
    ).print()
    return 0


def main() -> int:
    parser = benchmark_parser(__doc__, rounds=5, quick="1 round")
    parser.add_argument("--sample", type=int, default=5000, metavar="N", help="pages to ask (default: %(default)s)")
    add_inside_options(parser)
    args = parser.parse_args()
    rounds = 1 if args.quick else args.rounds

    def run() -> int:
        if args.inside:
            return inside(args.guest_kernel, args.guest_initrd, rounds, args.sample)
        arguments = ["--rounds", str(rounds), "--sample", str(args.sample)]
        return run_in_lab(__file__, arguments, memory=_HOST, cmdline=_RESERVED)

    return exit_status("drgn_peer", run)


if __name__ == "__main__":
    sys.exit(main())
