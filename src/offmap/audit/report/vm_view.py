"""What the HTML page shows of one VM: its pages by state, what maps them, and where. All lists are bounded."""

from collections.abc import Iterable

from offmap.audit.reach import Kind, Reach, ReachTotal
from offmap.audit.report.coverage import coverage_view
from offmap.audit.report.physmap import look_of_kind
from offmap.audit.report.text import KIND_NAMES, state_names, verdict_line
from offmap.audit.result import AuditResult
from offmap.audit.verdict import Verdict
from offmap.uapi.page import PAGE_SIZE
from offmap.units import format_size

NOTES = 40
_RANGES = 64

View = dict[str, object]
"""What the template shows, by the names that it uses."""


def size_of(pages: int) -> str:
    """The size of so many pages, for people."""
    return format_size(pages * PAGE_SIZE)


def reasons_of(vm: AuditResult) -> list[str]:
    """Why pages of the VM are unknown, a line for each reason."""
    return [f"{count:,} pages are unknown: {reason}" for reason, count in vm.pages.unknown_reasons.items()][:NOTES]


def notes_of(vm: AuditResult) -> list[str]:
    """What a reader must know about the verdict."""
    return [*([f"This is a partial result: {vm.partial}"] if vm.partial else []), *vm.notes][:NOTES]


def vm_view(vm: AuditResult, single: bool, opened: bool) -> View:
    """The section of one VM."""
    names = state_names(vm)
    looks = {"hidden": "hidden" if vm.verdict is Verdict.HIDDEN else "unmapped"}
    parts, x = [], 0.0
    ram = max(vm.pages.ram_pages, 1)
    for state, pages in vm.pages_by_state.items():
        # A sliver of what is grave must be seen: at least 4 of 1000.
        width = max(1000 * pages / ram, 4.0) if pages else 0.0
        parts.append(
            {
                "look": looks.get(state, state),
                "name": names[state],
                "pages": pages,
                "size": size_of(pages),
                "share": _share(pages, ram),
                "x": round(min(x, 1000 - width), 2),
                "width": round(width, 2),
            }
        )
        x += width
    return {
        "open": opened,
        "verdict": vm.verdict.value,
        "line": verdict_line(vm).partition(": ")[2],
        "parts": parts,
        "bar_label": ", ".join(f"{part['name']} {part['size']}" for part in parts if part["pages"]),
        "reasons": [] if single else reasons_of(vm),  # those of a single VM stand at the top
        "notes": [] if single else notes_of(vm),
        "reach": [
            {
                **_how_mapped(total),
                "region": total.region,
                "pages": total.pages,
                "size": size_of(total.pages),
                "ranges": total.ranges,
            }
            for total in sorted(vm.reach, key=lambda total: (total.kind != Kind.DIRECT_MAP, -total.pages))[:_RANGES]
        ],
        "ranges": [
            {
                "source": {"memslot": "memory slot", "range": "the user", "kvm": "KVM", "guess": "a guess"}.get(
                    part.source, part.source
                ),
                "va": f"{part.va:#x}",
                "bytes": part.bytes,
                "size": format_size(part.bytes),
                "guest": "" if part.guest_phys_addr is None else f"{part.guest_phys_addr:#x}",
                "backend": part.backend,
            }
            for part in vm.ranges[:_RANGES]
        ],
        "more_ranges": max(len(vm.ranges) - _RANGES, 0),
        "coverage": coverage_view(vm),
        "facts": _vm_facts(vm),
    }


def _vm_facts(vm: AuditResult) -> list[tuple[str, str]]:
    walk = vm.walk
    tables = sum(walk.tables.values())
    facts = [
        (
            "VMM",
            " ".join(filter(None, (vm.vmm.vmm, vm.vmm.executable, f"{vm.vmm.vcpus} vCPUs" if vm.vmm.vcpus else ""))),
        ),
        ("walk", f"{tables:,} tables in {walk.levels} levels, {walk.runs:,} runs of mappings, {walk.seconds:.3f} s"),
    ]
    for span in walk.unreadable[:4]:
        facts.append(("not walked", f"{span.va:#x}, {format_size(span.bytes)}: {span.reason}"))
    if vm.sharing is not None:
        count = vm.sharing.shared_pages
        text = f"{count:,} pages are mapped by other processes too" if count else "no page is mapped by another process"
        if vm.sharing.processes:
            text += ": " + ", ".join(
                f"{each.process} ({each.pid}): {each.pages:,}" for each in vm.sharing.processes[:8]
            )
        if vm.sharing.uncounted_pages:
            text += f"; of {vm.sharing.uncounted_pages:,} it cannot be counted"
        facts.append(("sharing", text))
    if vm.sandbox is not None:
        facts.append(("sandbox", str(vm.sandbox)))
        facts += [
            (f"descriptor {each.fd}", f"{each.kind}: {each.link} ({each.access or 'access unknown'})")
            for each in vm.sandbox.descriptors[:8]
        ]
    if vm.oracle is not None:
        facts.append(("second opinion", f"{vm.oracle}; the sample's seed is {vm.oracle.seed}"))
    if vm.scan is not None:
        facts.append(
            (
                "scan",
                f"{format_size(vm.scan.bytes_scanned)} of kernel mappings read in {vm.scan.seconds:.1f} s, "
                f"{format_size(vm.scan.bytes_unread)} mapped but not readable there; {vm.scan.count} found",
            )
        )
    return facts


def _share(pages: int, ram: int) -> str:
    """The share in percent. It is 0 % only of nothing, and 100 % only of everything."""
    share = 100 * pages / ram
    if pages and share < 0.1:
        return "< 0.1 %"
    return "> 99.9 %" if pages < ram and share > 99.9 else f"{share:.1f} %".replace(".0 %", " %")


def mapping_view(vm: AuditResult, mapping: Reach) -> View:
    """A row of the table of what the kernel maps."""
    return {
        **_how_mapped(mapping),
        "pid": vm.pid,
        "va": f"{mapping.va:#018x}",
        "pa": f"{mapping.pa:#x}",
        "user": f"{mapping.userspace_addr:#x}" if mapping.userspace_addr else "",
        "guest": "" if mapping.guest_phys_addr is None else f"{mapping.guest_phys_addr:#x}",
        "bytes": mapping.bytes,
        "size": format_size(mapping.bytes),
    }


def _how_mapped(mapping: Reach | ReachTotal) -> View:
    return {
        "look": look_of_kind(mapping.kind).value,
        "name": KIND_NAMES.get(mapping.kind, mapping.kind),
        "page_size": format_size(mapping.page_size),
        "page_bytes": mapping.page_size,
        "rights": mapping.rights,
        "caller": mapping.caller,
    }


def secrets_of(vms: Iterable[AuditResult]) -> Iterable[View]:
    """Where planted secrets of these VMs were read, a row for each place."""
    for vm in vms:
        if vm.scan is None:
            continue
        hits = [(f"canary {hit.canary:04x}", place) for hit in vm.scan.found for place in hit.places]
        hits += [("the secret", place) for place in vm.scan.places]
        for name, place in hits:
            yield {
                "pid": vm.pid,
                "secret": name,
                "va": f"{place.va:#018x}",
                "pa": f"{place.pa:#x}",
                "region": place.region,
                "owner": place.described_owner,
            }
