"""Which branches of what is fuzzed the corpus and some random inputs reach, and which they don't, with the reason."""

import tomllib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from coverage import Coverage

import offmap

from .run import TARGETS, Runner, corpus, inputs

_ROOT = Path(offmap.__file__).parent
_RANDOM = 600  # inputs of each target
_REASONS = Path(__file__).with_name("unreached.toml")


class Covered:
    """What was reached.

    Attributes:
        files: of each source, the branches that it has and those of them that were reached.
        unreached: of each source, the lines that branch, and of whose branches not all were reached.
    """

    def __init__(self) -> None:
        self.files: dict[str, tuple[int, int]] = {}
        self.unreached: dict[str, list[str]] = {}

    @property
    def share(self) -> float:
        """Of all branches, those that were reached: 0 to 1."""
        return sum(taken for _, taken in self.files.values()) / sum(whole for whole, _ in self.files.values())

    def unexcused(self) -> Iterator[str]:
        """What was not reached, and no reason says why."""
        reasons = tomllib.loads(_REASONS.read_text())
        for source, lines in self.unreached.items():
            for line in lines:
                if not any(each in line for each in reasons.get(source, ())):
                    yield f"not reached, and no reason given: {source}: {line}"

    def __str__(self) -> str:
        rows = [f"  {source:<40} {taken:4} of {all_:4} branches" for source, (all_, taken) in self.files.items()]
        whole = sum(all_ for all_, _ in self.files.values())
        taken = sum(taken for _, taken in self.files.values())
        return "\n".join([*rows, f"{taken} of {whole} branches reached ({100 * taken / max(whole, 1):.1f} %)"])


def cover() -> Covered:
    """Run every target on its corpus and on random inputs, and see what it reaches."""
    sources = sorted({source for target in TARGETS.values() for source in target.sources})
    coverage = Coverage(branch=True, include=[str(_ROOT / source) for source in sources], data_file=None)
    coverage.start()
    try:
        for name in TARGETS:
            with Runner(name) as runner:
                for data in (*corpus(name), *islice(inputs(1), _RANDOM)):
                    runner(data)
    finally:
        coverage.stop()
    return _read(coverage, sources)


def _read(coverage: Coverage, sources: list[str]) -> Covered:
    found = Covered()
    for source in sources:
        path = _ROOT / source
        text = path.read_text().split("\n")
        # The public interface has only what a report prints.
        analysis = coverage._analyze(str(path))
        stats = analysis.branch_stats()
        missing = [line for line, (whole, taken) in stats.items() if taken < whole]
        found.files[source] = sum(whole for whole, _ in stats.values()), sum(taken for _, taken in stats.values())
        found.unreached[source] = [f"{line}: {text[line - 1].strip()}" for line in sorted(missing)]
    return found
