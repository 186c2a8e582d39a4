"""``--oracle drgn`` on the running kernel: compares a sample of the audit's answers with drgn's."""

from contextlib import suppress

from offmap.audit.btf import Btf, Unknown
from offmap.audit.drgn_kernel import DrgnKernel
from offmap.audit.frames import POPULATED, resolve
from offmap.audit.guest_pages import GuestPages
from offmap.audit.guest_ram import RamRange
from offmap.audit.kcore import Kcore
from offmap.audit.kernel_objects import KernelObjects
from offmap.audit.mappings import KernelMappings
from offmap.audit.oracle import Lookups, Sample, ask_oracle
from offmap.audit.process import Process
from offmap.audit.regions import Layout
from offmap.audit.result import OracleResult, Source
from offmap.audit.walk import walk_kernel_half
from offmap.uapi.page import PAGE_SIZE


def second_opinion(
    process: Process,
    kcore: Kcore,
    mappings: KernelMappings,
    layout: Layout,
    guest: GuestPages,
    sample: Sample,
) -> OracleResult:
    """Ask drgn about a sample of what was found.

    Raises:
        OracleDisagrees: it says something else.
        OffmapError: drgn is not installed.
        Undetermined: it cannot look at this kernel.
    """
    info = kcore.vmcoreinfo

    def frame(va: int) -> int | None:
        found = resolve(process, [RamRange(va, PAGE_SIZE, Source.REQUESTED)], kcore.page_flags)
        return int(found.pfn[0]) if found.state[0] == POPULATED else None

    def walk() -> KernelMappings:
        return walk_kernel_half(kcore, info.root_pa, info.levels, kcore.page_offset_base, info.sme_mask)

    top = 0
    with suppress(Unknown):
        top = KernelObjects(kcore, layout, Btf.of_host()).page_table_of(process.pid)
    lookups = Lookups(frame, walk, top, info.phys_base, info.kernel_image_size)
    return ask_oracle(DrgnKernel(), mappings, guest, lookups, sample)
