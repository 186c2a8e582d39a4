"""Where the cells of one report are not alike: of other code, kernels or machines, as a report merges several runs."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from offmap.compare.cell_result import CellResult
from offmap.compare.report.conclude import list_words
from offmap.compare.report.words import release_of, short_kernel

_NAMED = 8  # of cells, in a sentence: more are no sentence

KernelState = tuple[str, str]
"""A kernel's release, and the digest of its image; empty where that is not known."""

S = TypeVar("S")


def notes_of(results: Sequence[CellResult]) -> list[str]:
    """What a reader must know of where these cells come from, if they are not all alike: sentences."""
    notes = []
    coded = [result for result in results if _code(result)]
    codes = set(map(_code, coded))
    if len(codes) > 1:
        most = _most(coded, _code)
        others = _named([result for result in coded if _code(result) != most], results)
        notes.append(
            f"These cells were measured by {len(codes)} states of offmap's code; within a cell all is of one. "
            + (f"Not of the same as most: {others}. " if others else "")
            + "Run again, it measures those of other states anew."
        )
    for kernel in dict.fromkeys(result.spec.host_kernel for result in results):
        cells = [result for result in results if result.spec.host_kernel == kernel]
        what = "what is concluded for it compares cells of different kernels"
        notes += _kernels(f"Host kernel {short_kernel(kernel)}", cells, host_kernel_state, what)
    for kernel in dict.fromkeys(result.spec.guest_kernel for result in results):
        cells = [result for result in results if result.spec.guest_kernel == kernel]
        what = "its cells differ in their guests too"
        notes += _kernels(f"Guest kernel {short_kernel(kernel)}", cells, guest_kernel_state, what)
    ways = sorted({result.machine.accel for result in results if result.machine.accel})
    if len(ways) > 1:
        notes.append(
            f"Some of these hosts were run by {' and some by '.join(ways)}: their ratios are not of the same machine."
        )
    return notes + _machines(results)


def host_kernel_state(result: CellResult) -> KernelState:
    """The kernel that its host really had."""
    return result.inputs.get("host_release") or release_of(result), result.inputs.get("host_kernel", "")


def guest_kernel_state(result: CellResult) -> KernelState:
    """The kernel that its guests really had."""
    return result.inputs.get("guest_release", ""), result.inputs.get("guest_kernel", "")


def _code(result: CellResult) -> str:
    return result.inputs.get("code", "")


def _kernels(
    title: str, cells: Sequence[CellResult], state_of: Callable[[CellResult], KernelState], so: str
) -> list[str]:
    """A note where one name stands for several kernels. What a cell does not tell of its kernel tells nothing apart."""
    known = [cell for cell in cells if any(state_of(cell))]
    states = dict.fromkeys(map(state_of, known))
    if all(len({part for part in parts if part}) < 2 for parts in zip(*states, strict=True)):
        return []
    most = _most(known, state_of)
    said = []
    for state in [most, *(each for each in states if each != most)]:
        release, digest = state
        image = f"image {digest}" if digest and digest != release else ""
        of = _named([cell for cell in known if state_of(cell) == state], cells) if state != most else ""
        said.append(
            " ".join(word for word in (release, f"({image})" if image else "", f"for {of}" if of else "") if word)
        )
    return [f"{title} is not one kernel here but {len(said)}: {'; '.join(said)}. So {so}."]


def _machines(results: Sequence[CellResult]) -> list[str]:
    # A cell that was refused before its host was started says nothing of what would have run that.
    machines = [result.machine for result in results if result.machine.accel]
    parts = []
    for title, found in (
        ("CPUs", sorted({machine.cpu for machine in machines if machine.cpu})),
        ("QEMU versions", sorted({machine.qemu for machine in machines if machine.qemu})),
    ):
        if len(found) > 1:
            parts.append(f"{len(found)} {title} ({'; '.join(found)})")
    if not parts:
        return []
    return [
        f"These cells were measured with {list_words(parts)}: costs of different cells are not of the same machine."
    ]


def _most(results: Sequence[CellResult], state_of: Callable[[CellResult], S]) -> S:
    """The state that most are of; of equals, the one that was measured last."""
    count = Counter(map(state_of, results))
    return state_of(max(results, key=lambda result: (count[state_of(result)], result.time)))


def _named(some: Sequence[CellResult], of: Sequence[CellResult]) -> str:
    """``all on debian:6.1 and memfd on debian:6.12``; empty if that is too long for a sentence."""
    named = {cell.spec for cell in some}
    others = {(cell.spec.backend, cell.spec.host_kernel) for cell in of if cell.spec not in named}
    kernels = {kernel for _, kernel in others}
    names: dict[str, None] = {}
    for backend, kernel in dict.fromkeys((cell.spec.backend, cell.spec.host_kernel) for cell in some):
        part = " in some settings" if (backend, kernel) in others else ""
        name = f"{backend} on {short_kernel(kernel)}{part}" if kernel in kernels else f"all on {short_kernel(kernel)}"
        names[name] = None
    return list_words([*names]) if len(names) <= _NAMED else ""
