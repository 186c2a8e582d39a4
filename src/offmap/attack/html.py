"""The result of an attack as one page of HTML: each chain drawn as a path, which stops where the attack did."""

from offmap.attack.result import AttackResult, Attempt, Outcome
from offmap.attack.text import headline, hours
from offmap.report.html import render_page
from offmap.report.typed import plain
from offmap.units import format_size

View = dict[str, object]

_SHORT = 72  # characters that fit beside a step
_STEP = 40


def render_html(result: AttackResult) -> str:
    """The page."""
    return render_page("attack.html.j2", _page(result), ["style.css", "attack.css"], "attack.js", "offmap.attack")


def _page(result: AttackResult) -> View:
    attempts = [("Attack", result.attempt), *([("Control", result.control)] if result.control else [])]
    return {
        "word": result.outcome.upper(),
        "outcome": result.outcome,
        "line": plain(result.reason),
        "when": result.time.replace("T", " ").replace("Z", " UTC"),
        "offmap": result.offmap,
        "lab": result.host.lab,
        "paths": [_path(title, attempt) for title, attempt in attempts],
        "residues": [
            {"name": each.name, "size": format_size(each.bytes), "note": plain(each.note)}
            for each in result.attempt.residues
        ],
        "runs": [
            {"size": format_size(run.bytes), "at": f"{run.va:#x}", "region": run.region}
            for run in (result.attempt.sweep.runs if result.attempt.sweep else ())
        ],
        "parts": [
            {"name": part.name, "size": format_size(part.bytes)}
            for part in (result.attempt.sweep.parts if result.attempt.sweep else ())
        ],
        "bytes": f"{result.attempt.bytes:,}",
        "times": [
            {"leak": each.leak, "source": each.source, "rate": f"{each.bytes_per_second:,g}", "time": hours(each.hours)}
            for each in result.times
        ],
        "facts": [
            ("host", result.host.name),
            ("kernel", result.host.kernel),
            ("CPU", result.host.cpu),
            ("primitive", result.primitive),
            *(("knowledge", each) for each in result.knowledge),
        ],
    }


def _path(title: str, attempt: Attempt) -> View:
    last, over = len(attempt.stages) - 1, False
    stages = []
    for number, stage in enumerate(attempt.stages):
        stopped = stage.name == attempt.stage and not stage.passed
        ended = attempt.outcome == Outcome.ENDS
        over = over or stopped  # what is tried after that is no way
        stages.append(
            {
                "y": 20 + _STEP * number,
                "name": stage.name,
                "reads": f"{stage.reads:,}",
                "failures": f"{stage.failures:,}",
                "found": plain(stage.found),
                "short": plain(stage.found[:_SHORT]) + ("…" if len(stage.found) > _SHORT else ""),
                "next": "" if number == last else "open" if over or not stage.passed else "way",
                "bar": ("stop" if ended else "lost") if stopped else "",
                "got": attempt.outcome in {Outcome.RECOVERED, Outcome.REACHED} and stage.name == attempt.stage,
            }
        )
    return {
        "title": title,
        "line": plain(headline(attempt)),
        "height": 20 + _STEP * len(stages) + 10,
        "stages": stages,
    }
