"""Cells of a comparison, made up: as they would be if all went as it should, for tests to take something away."""

from typing import Any

from msgspec.structs import replace

from offmap.compare.cell_result import CellOutcome, CellResult
from offmap.compare.facts import Host, Machine
from offmap.compare.questions import CATALOGUE, Answer, Kind
from offmap.compare.spec import CellSpec

PLAIN = ("anon", "memfd", "hugetlb", "guest_memfd")
_SOME = {"hidden.ram_pages": 65536.0, "hidden.canaries_planted": 32.0}
_IF_PLAIN = {
    "hidden.direct_map_pages": 20480.0,
    "hidden.direct_map_pages_after_io": 25600.0,
    "hidden.canaries_found": 32.0,
    "hidden.canaries_found_after_io": 32.0,
}
_PAIRED = ("costs.populate", "costs.copy", "costs.chase", "costs.blk_read", "costs.blk_write", "costs.net")


def answers_of(plain: bool, factor: float = 1.0) -> dict[str, Answer]:
    """A good answer to everything; of plain RAM, that it is exposed."""
    found = {}
    for id, asked in CATALOGUE.items():
        if asked.kind is Kind.TRI_STATE:
            exposed = plain and id in {"hidden.before_io", "hidden.after_io"}
            found[id] = Answer(id, not exposed, "the host kernel maps guest RAM" if exposed else "")
        elif id in _PAIRED:
            baseline = (100.0, 101.0, 99.0, 102.0, 98.0)
            found[id] = Answer(id, 100 * factor, samples=tuple(factor * value for value in baseline), baseline=baseline)
        else:
            found[id] = Answer(id, _SOME.get(id, _IF_PLAIN.get(id, 0.0) if plain else 0.0))
    return found


def cell(
    backend: str = "unplugged",
    host_kernel: str = "debian:6.12",
    outcome: CellOutcome = CellOutcome.BOOTED,
    answers: dict[str, Answer] | None = None,
    **more: Any,
) -> CellResult:
    """One cell; its answers are those of `answers_of`, and `answers` instead of them where given."""
    spec = CellSpec(backend, host_kernel, **{name: more.pop(name) for name in ("vcpus", "kvm_clock") if name in more})
    ran = outcome is not CellOutcome.REFUSED
    return CellResult(
        spec=spec,
        outcome=outcome,
        answers=tuple({**(answers_of(backend in PLAIN) if ran else {}), **(answers or {})}.values()),
        host=Host("6.12.117", "QEMU TCG", cmdline="memmap=256M$0x60000000", name="secret-name"),
        machine=Machine("tcg", "some CPU", kernel="6.18"),
        inputs={"code": "c0de", "host_kernel": "d1", "guest_kernel": "d1", "guest_release": "6.12.117"},
        seconds=91.5,
        time="2026-11-23T00:00:00Z",
        **more,
    )


def without(result: CellResult, *ids: str) -> CellResult:
    """The same with these answers taken away."""
    return replace(result, answers=tuple(answer for answer in result.answers if answer.question not in ids))
