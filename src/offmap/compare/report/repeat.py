"""How a comparison is repeated: the command that runs these cells, the cells that are missing, and the hosts' facts."""

import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence

from offmap.compare.cell_result import CellResult
from offmap.compare.facts import Host, Machine
from offmap.compare.matrix import DEFAULT_AXES, FULL_AXES, Axes, cells_of
from offmap.compare.questions import MIN_PAIRS
from offmap.compare.report.notes import KernelState, guest_kernel_state, host_kernel_state
from offmap.compare.report.words import short_kernel
from offmap.compare.spec import NATIVE
from offmap.errors import OffmapError
from offmap.units import format_size

_NAMES = 200  # of cells that are missing
_BOOTS = str(MIN_PAIRS)  # the command's default


def axes_of(results: Sequence[CellResult]) -> Axes | None:
    """The smallest matrix with all of these cells; None where one of them is in no matrix of this version."""
    specs = [result.spec for result in results]
    try:
        return Axes(
            backends=_ordered((spec.backend for spec in specs), DEFAULT_AXES.backends),
            host_kernels=_ordered((spec.host_kernel for spec in specs), FULL_AXES.host_kernels),
            guest_kernels=_ordered((spec.guest_kernel for spec in specs), FULL_AXES.guest_kernels),
            vcpus=tuple(sorted({spec.vcpus for spec in specs})),
            kvm_clocks=_ordered((spec.kvm_clock for spec in specs), ("auto", "off", "on")),
        )
    except OffmapError:
        return None


def _ordered(values: Iterable[str], order: Sequence[str]) -> tuple[str, ...]:
    present = dict.fromkeys(values)
    return (*(each for each in order if each in present), *(each for each in present if each not in order))


def in_order(results: Sequence[CellResult]) -> list[CellResult]:
    """In the order of their matrix, whenever each was run; what is in none comes last."""
    axes = axes_of(results)
    places = {} if axes is None else {spec: place for place, spec in enumerate(cells_of(axes))}
    return sorted(results, key=lambda result: places.get(result.spec, len(places)))


def commands_of(results: Sequence[CellResult]) -> list[str]:
    """What makes these cells again, from a checkout, and no others: one command, or one for each setting."""
    boots = {result.inputs.get("boots", _BOOTS) for result in results}
    option = f" --boots {boots.pop()}" if len(boots) == 1 and boots != {_BOOTS} else ""
    return [command + option for command in _commands_of(results)]


def _commands_of(results: Sequence[CellResult]) -> list[str]:
    axes = axes_of(results)
    if axes is None:
        return []
    specs = {result.spec for result in results}
    if specs == set(cells_of(axes)):
        return [_command(axes)]
    groups: dict[tuple[str, str, int, str], list[CellResult]] = {}
    for result in results:
        groups.setdefault(result.spec.setting, []).append(result)
    each = [axes_of(group) for group in groups.values()]
    return [_command(axes) for axes in each if axes is not None]


def _command(axes: Axes) -> str:
    if axes == DEFAULT_AXES:
        return "offmap compare"
    if axes == FULL_AXES:
        return "offmap compare --full"
    words = ["offmap", "compare"]
    if axes.host_kernels == (NATIVE,):
        words.append("--native")
    elif axes.host_kernels != DEFAULT_AXES.host_kernels:
        words += _options("--host-kernel", axes.host_kernels)
    others: dict[str, tuple[Sequence[object], Sequence[object]]] = {
        "--backend": (axes.backends, DEFAULT_AXES.backends),
        "--guest-kernel": (axes.guest_kernels, DEFAULT_AXES.guest_kernels),
        "--vcpus": (axes.vcpus, DEFAULT_AXES.vcpus),
        "--kvm-clock": (axes.kvm_clocks, DEFAULT_AXES.kvm_clocks),
    }
    for name, (mine, by_default) in others.items():
        words += _options(name, mine) if mine != by_default else []
    return shlex.join(words)


def _options(name: str, values: Sequence[object]) -> list[str]:
    return [word for value in values for word in (name, short_kernel(str(value)))]


def missing_of(results: Sequence[CellResult]) -> list[str]:
    """Cells of the same matrix that are not among these, by their titles."""
    axes = axes_of(results)
    if axes is None:
        return []
    there = {result.spec for result in results}
    names = [spec.title for spec in cells_of(axes) if spec not in there]
    more = len(names) - _NAMES
    return [*names[:_NAMES], f"and {more} more"] if more > 0 else names


def facts_of(results: Sequence[CellResult]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The hosts that the cells ran on, and the machines that these ran on: each once, without their names."""
    found: dict[str, list[tuple[str, str]]] = {}
    hosts = [result for result in results if result.host != Host()]
    guests = [result for result in results if result.inputs.get("guest_release")]
    for name, result in _each_kernel("host", hosts, lambda cell: cell.spec.host_kernel, host_kernel_state):
        facts = _facts(result.host, "kernel", "cpu", "microcode", "memory_bytes", "cmdline")
        found[name] = [*facts, ("digest of its image", host_kernel_state(result)[1])]
    for name, result in _each_kernel("guest", guests, lambda cell: cell.spec.guest_kernel, guest_kernel_state):
        release, digest = guest_kernel_state(result)
        found[name] = [("kernel", release), ("digest of its image", digest)]
    machines = {}
    # A cell that was refused before its host was started says nothing of what would have run that.
    for result in [cell for cell in results if cell.machine.accel] or results:
        facts = _facts(result.machine, "kernel", "cpu", "microcode", "processors", "memory_bytes", "accel", "qemu")
        machines[tuple(facts)] = facts
    for at, facts in enumerate(machines.values(), 1):
        found["machine" if len(machines) == 1 else f"machine {at}"] = facts
    codes = dict.fromkeys(result.inputs.get("code", "") for result in results)
    found["offmap"] = [
        ("version", ", ".join(dict.fromkeys(result.offmap for result in results))),
        ("digest of what measured", ", ".join(code for code in codes if code)),
    ]
    return [(name, [(key, value) for key, value in facts if value]) for name, facts in found.items()]


def _each_kernel(
    what: str,
    results: Iterable[CellResult],
    name_of: Callable[[CellResult], str],
    state_of: Callable[[CellResult], KernelState],
) -> Iterator[tuple[str, CellResult]]:
    """A heading, and a cell, for every kernel; where one name stands for several, these are numbered."""
    named: dict[str, dict[KernelState, CellResult]] = {}
    for result in results:
        named.setdefault(short_kernel(name_of(result)), {}).setdefault(state_of(result), result)
    for name, states in named.items():
        for at, result in enumerate(states.values(), 1):
            yield f"{what} {name}" + (f", {at} of {len(states)}" if len(states) > 1 else ""), result


_LABELS = {
    "cpu": "CPU",
    "memory_bytes": "memory",
    "cmdline": "command line",
    "accel": "runs the hosts by",
    "qemu": "QEMU",
}


def _facts(source: Host | Machine, *names: str) -> list[tuple[str, str]]:
    facts = []
    for name in names:
        value = getattr(source, name)
        text = format_size(value) if name == "memory_bytes" and value else str(value or "")
        facts.append((_LABELS.get(name, name), text))
    return facts
