"""When the page tables were walked, for the HTML page: each walk's place in the stretch of time."""

from offmap.audit.result import AuditResult, Coverage, Look

_WIDTH = 1000  # of the picture
_NARROWEST = 2.0
_MOST = 400  # walks that are drawn: more cannot be told apart


def coverage_view(vm: AuditResult) -> dict[str, object] | None:
    """What the template shows; None in results of older versions."""
    coverage = vm.coverage
    if coverage is None or not coverage.looks:
        return None
    total = max(coverage.seconds, coverage.looks[-1].at + coverage.looks[-1].seconds, 0.001)
    step = -(-len(coverage.looks) // _MOST)
    # A walk that does not count is never left out.
    shown = [look for number, look in enumerate(coverage.looks) if number % step == 0 or not look.whole][:_MOST]
    return {
        "text": _text(coverage),
        "walks": [
            {
                "look": "ram" if look.whole else "unknown",
                "x": round(min(_WIDTH * look.at / total, _WIDTH - _NARROWEST), 2),
                "width": round(max(_WIDTH * look.seconds / total, _NARROWEST), 2),
                "title": _title(look),
            }
            for look in shown
        ],
    }


def _text(coverage: Coverage) -> str:
    """How much was looked at, in a sentence."""
    failed = sum(not look.whole for look in coverage.looks)
    new = [look.at for look in coverage.looks if look.new]
    roots = sum(coverage.roots.values())
    text = f"{coverage.walks:,} walks of the page tables of {roots:,} roots in {coverage.seconds:.2f} s"
    if failed:
        text += f"; {failed:,} more do not count, as tables changed meanwhile"
    return text + (f"; the last one that found a new mapping began at {new[-1]:.2f} s" if new else "")


def _title(look: Look) -> str:
    what = "" if look.whole else ", does not count: tables changed meanwhile"
    return f"at {look.at:.3f} s, for {look.seconds:.3f} s{what}{', found new mappings' if look.new else ''}"
