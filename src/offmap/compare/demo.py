"""The demonstration, a small preset of the comparison: a guest on each kind of RAM, checked against the claims."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from offmap import __version__
from offmap.audit.host import utc_now
from offmap.audit.verdict import Verdict
from offmap.compare.capacity import cells_at_a_time
from offmap.compare.cell_result import CellOutcome, CellResult
from offmap.compare.cell_run import Settings, usual_deadline
from offmap.compare.claims import CANARIES, PATCHED, STOCK, Claim, DemoRow, Mismatch, check, row_name, without_control
from offmap.compare.events import Events
from offmap.compare.facts import Host
from offmap.compare.first_look import QUESTIONS
from offmap.compare.guest import guest_initramfs
from offmap.compare.job import Preset
from offmap.compare.kinds import Vmm, kind_of
from offmap.compare.knowledge import knowledge_of
from offmap.compare.matrix import longest_first
from offmap.compare.scheduler import Scheduler, local_pool
from offmap.compare.spec import CellSpec
from offmap.errors import ExitStatus, OffmapError
from offmap.kmod.lab_build import get_headers
from offmap.lab.firecracker import released_firecracker
from offmap.lab.initramfs import busybox
from offmap.lab.kernel import HostKernel
from offmap.lab.provision import default_spec, host_kernel
from offmap.lab.qemu import find_qemu
from offmap.lab.vmlinux import vmlinux_of

SCHEMA = "offmap-demo/2"
PRESET = Preset(
    questions=QUESTIONS,
    canaries=CANARIES,
    memory="1536M",
    cmdline="memmap=256M$0x30000000 secretmem.enable=1",  # 256 MiB at 768 MiB, for `reserved`
    unpacked=True,
    fresh=False,
)
"""All cells need the same kind of host, so that they can share one."""

_NUMBERS = {
    "ram_pages": "hidden.ram_pages",
    "pages_populated": "hidden.populated_pages",
    "direct_map_pages": "hidden.direct_map_pages",
    "alias_pages": "hidden.alias_pages",
    "unknown_pages": "hidden.unknown_pages",
    "excluded_pages": "hidden.excluded_pages",
    "canaries_planted": "hidden.canaries_planted",
    "canaries_found": "hidden.canaries_found",
    "scanned_bytes": "hidden.scanned_bytes",
    "populate_seconds": "costs.ram_ready",
    "boot_seconds": "costs.boot",
    "attack_reads": "hidden.attack_reads",
}
_VERDICTS = {True: Verdict.HIDDEN, False: Verdict.EXPOSED, None: Verdict.UNKNOWN}


class DemoResult(Struct, frozen=True, tag_field="schema", tag=SCHEMA):
    """The result of a demonstration. Its JSON is report.json.

    Attributes:
        time: when it ended (UTC, ISO 8601).
        host: the disposable hosts, which are alike.
        left_out: what could not be tried here and why, or empty.
        mismatches: the results that contradict a claim.
    """

    offmap: str
    time: str
    host: Host
    cells: tuple[DemoRow, ...]
    left_out: str
    mismatches: tuple[Mismatch, ...] = msgspec.field(name="surprises")

    @property
    def exit_status(self) -> ExitStatus:
        """0 if every claim held; else the status of the gravest mismatch: exposed, then failed, then unknown."""
        found = {mismatch.exit_status for mismatch in self.mismatches}
        order = (ExitStatus.EXPOSED, ExitStatus.FAILED, ExitStatus.UNDETERMINED)
        return next((status for status in order if status in found), ExitStatus.DONE)


def claims_of(kernel_spec: str) -> tuple[Claim, ...]:
    """The guests for a host kernel (offmap.lab.provision.host_kernel), each with its claim."""
    return PATCHED if kernel_spec.startswith("patched:") else STOCK


def specs_of(kernel_spec: str, claims: Iterable[Claim]) -> list[CellSpec]:
    """A cell for each claim, in their order. Guests run the host's kernel; on a patched host, a stock one."""
    guest = default_spec() if kernel_spec.startswith("patched:") else kernel_spec
    return [CellSpec(claim.backend, kernel_spec, guest, kvm_clock=claim.kvm_clock) for claim in claims]


def row_of(result: CellResult) -> DemoRow:
    """A cell's answers as a row."""
    booted = result.answer("works.boot").value is True
    hidden = result.answer("hidden.before_io")
    fields: dict[str, object] = {
        "backend": result.spec.backend,
        "kvm_clock": result.spec.kvm_clock,
        "host_kernel": result.host.kernel,
        "guest_kernel": result.guest.kernel,
        "clocksource": result.guest.clocksource or None,
        "outcome": result.outcome,
        "reason": result.oops or result.reason or (hidden.reason if booted else ""),
        "verdict": _VERDICTS[hidden.value if isinstance(hidden.value, bool) else None] if booted else None,
    }
    if attack := result.answered.get("hidden.attack"):
        fields |= {"attack_ends": attack.value, "attack": attack.reason}
        beside = result.answer("hidden.attack_reads").baseline
        fields["plain_attack_reads"] = int(beside[0]) if beside else None
    for name, id in _NUMBERS.items():
        value = result.answer(id).value
        fields[name] = value if value is None or name.endswith("_seconds") else int(value)
    return msgspec.convert(fields, DemoRow)


def run_demo(
    out: Path,
    kernel_spec: str,
    modules: Path | None,
    accel: str,
    events: Events,
    say: Callable[[str], None],
    firecracker: Path | None = None,
) -> DemoResult:
    """Run it, with as many hosts at a time as there are processors.

    Args:
        out: folder for the report and the guests' initramfs.
        kernel_spec: the host kernel (offmap.lab.provision.host_kernel).
        modules: its ``lib/modules/RELEASE`` folder, where it is a bzImage.
        accel: of the disposable hosts: auto, tcg or kvm.
        events: takes the events of the cells, from any thread.
        say: takes a line about what is done before the first event.
        firecracker: the program; None: the released one, which is fetched.

    Raises:
        OffmapError: a kernel cannot be had, the report cannot be written, or a host cannot be started.
    """
    claims = claims_of(kernel_spec)
    specs = specs_of(kernel_spec, claims)
    find_qemu()
    busybox()
    say("getting the kernels of host and guests")
    if firecracker is None and any(kind_of(spec.backend).vmm is Vmm.FIRECRACKER for spec in specs):
        _meanwhile(released_firecracker)
    with ThreadPoolExecutor() as threads:
        wanted = dict.fromkeys((specs[0].host_kernel, specs[0].guest_kernel))
        with_module = any(kind_of(spec.backend).backend.needs_module for spec in specs)

        def early(release: str) -> None:
            if with_module:  # its headers are got while the kernel is unpacked
                _meanwhile(partial(get_headers, release))

        made = [
            threads.submit(host_kernel, name, modules if name == kernel_spec else None, say, early) for name in wanted
        ]
        kernels = [each.result() for each in made]
    _meanwhile(partial(vmlinux_of, kernels[-1].vmlinuz))  # the guests', unpacked while the hosts start
    path = out.resolve() / "report.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # of an earlier run: an interrupted run must not leave it
        initrd = path.with_name("guest.initramfs")
        initrd.write_bytes(guest_initramfs())
    except OSError as error:
        raise OffmapError(
            f"cannot write to {path.parent}: {error.strerror}", "give another folder with --out"
        ) from None
    preset = replace(PRESET, attacked=tuple(claim.backend for claim in claims if claim.attacked))
    settings = Settings(usual_deadline(), accel, preset=preset, initrd=initrd, modules=modules, firecracker=firecracker)
    scheduler = Scheduler(None, settings, events)
    with local_pool(cells_at_a_time()) as pool, ThreadPoolExecutor(1) as thread:
        asked = thread.submit(_no_attack, claims, kernels)  # takes a second; the cell finds it out for itself
        results = scheduler.run(_order(specs, preset.attacked), pool)
        no_attack = asked.result()
    if no_attack:
        claims = tuple(replace(claim, attacked=False) for claim in claims)
    result = judge([results[spec] for spec in specs], claims, no_attack)
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(result)) + b"\n")
    except OSError as error:
        raise OffmapError(f"cannot write {path}: {error.strerror}", "give another folder with --out") from None
    return result


def _meanwhile(fetch: Callable[[], object]) -> None:
    """Begin to fetch what a cell will need. That cell waits for it; where it cannot be had, the cell says so."""

    def run() -> None:
        with suppress(OffmapError):
            fetch()

    Thread(target=run, daemon=True).start()


def _no_attack(claims: Iterable[Claim], kernels: Iterable[HostKernel]) -> str:
    """Why no attack can be tried on these kernels; empty if one can, or none is claimed to end."""
    if any(claim.attacked for claim in claims):
        try:
            for kernel in kernels:
                knowledge_of(kernel)
        except OffmapError as error:
            return f"the attack is left out: {error}"
    return ""


def _order(specs: Sequence[CellSpec], attacked: Sequence[str] = ()) -> list[CellSpec]:
    """The longest first. But the very first cell needs no module, as a build would delay the first boot.

    Args:
        attacked: kinds of RAM whose guests are attacked, which takes as long as another guest.
    """
    first = next(spec for spec in specs if not kind_of(spec.backend).backend.needs_module)
    longest, *others = longest_first(spec for spec in specs if spec != first)
    return [first, longest, *sorted(others, key=lambda spec: spec.backend not in attacked)]


def judge(results: Sequence[CellResult], claims: Sequence[Claim], no_attack: str = "") -> DemoResult:
    """Check the cells of a demonstration against the claims.

    Args:
        no_attack: why none was tried, if one should have been.
    """
    # There is no module for this kernel, or no Firecracker, and so no host was started: the kind of RAM was not tried.
    untried = [result for result in results if result.outcome is CellOutcome.REFUSED and not result.machine.accel]
    names = [row_name(result.spec) for result in untried]
    whys: dict[str, list[str]] = {}
    for result, name in zip(untried, names, strict=True):
        whys.setdefault(result.reason, []).append(name)
    missing = [f"{', '.join(left)} left out: {why}" for why, left in whys.items()]
    left_out = "; ".join(filter(None, (*missing, no_attack)))
    rows = [row_of(result) for result in results if result not in untried]
    claims = [claim for claim in claims if claim.name not in names]
    host = next((result.host for result in results if result.host != Host()), Host())
    mismatches = tuple(check(rows, claims))
    return DemoResult(__version__, utc_now(), host, tuple(without_control(rows, claims)), left_out, mismatches)
