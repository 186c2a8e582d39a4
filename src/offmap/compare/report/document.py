"""A comparison as JSON (offmap-compare/1): the cells with all their answers, the questions, and the conclusions.

The form is published: schema/offmap-compare.json. Names of hosts, and the command line of the machine that the
disposable hosts ran on, are left out: they say nothing of the results, and these are made to be shown.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from offmap import __version__
from offmap.compare.cell_result import CellResult
from offmap.compare.questions import CATALOGUE
from offmap.compare.report.conclude import Conclusion, conclude
from offmap.compare.report.notes import notes_of
from offmap.compare.report.repeat import commands_of, missing_of
from offmap.compare.report.standing import BASELINE, standing_of

__all__ = ["SCHEMA", "compare_document"]

SCHEMA = "offmap-compare/1"
_OF_HOSTS = ("kernel", "cpu", "microcode", "cmdline", "memory_bytes", "lab")
_OF_MACHINES = ("kernel", "cpu", "microcode", "processors", "memory_bytes", "accel", "qemu")


def compare_document(results: Sequence[CellResult]) -> dict[str, Any]:
    """For json.dumps."""
    return {
        "schema": SCHEMA,
        "offmap": __version__,
        "time": max((result.time for result in results), default=""),
        "commands": commands_of(results),
        "baseline": BASELINE,
        "emulated": any(result.emulated for result in results),
        "conclusions": [_conclusion(each) for each in conclude(results)],
        "missing": missing_of(results),
        "notes": notes_of(results),
        "questions": [
            {
                "id": asked.id,
                "group": asked.group.value,
                "title": asked.title,
                "kind": asked.kind.value,
                "better": asked.better.value,
                "unit": asked.unit,
                "explanation": asked.explanation,
                "emulation": asked.emulation,
            }
            for asked in CATALOGUE.values()
        ],
        "cells": [_cell(result) for result in results],
    }


def _conclusion(one: Conclusion) -> dict[str, Any]:
    return {
        "host_kernel": one.name,
        "release": one.release,
        "answer": one.answer,
        "choice": one.choice,
        "unsettled": list(one.unsettled),
        "kinds": [
            {
                "backend": finding.backend,
                "standing": finding.standing.value,
                "cells": len(finding.cells),
                "hiding": len(finding.hiding),
                "lost": dict(finding.lost),
                "undetermined": dict(finding.undetermined),
            }
            for finding in one.findings
        ],
    }


def _cell(result: CellResult) -> dict[str, Any]:
    data = result.to_json()
    answers = []
    for answer in result.answers.values():
        ratio = answer.ratio
        answers.append(
            {
                **answer.to_json(),
                "ratio": ratio and {"median": ratio.median, "low": ratio.low, "high": ratio.high, "pairs": ratio.pairs},
            }
        )
    return {
        **data,
        "key": result.spec.key,
        "standing": standing_of(result).value,
        "host": _only(result.host, _OF_HOSTS),
        "machine": _only(result.machine, _OF_MACHINES),
        "answers": answers,
    }


def _only(facts: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: facts[name] for name in names if name in facts}
