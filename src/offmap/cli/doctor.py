"""``offmap doctor``: which kinds of RAM this host can give, which of them hide, and what to do for more."""

import argparse
import json


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``doctor``."""
    parser = subparsers.add_parser(
        "doctor",
        description="Try every kind of RAM on this host: get some, run a tiny guest in it, audit it, give it back.",
        epilog="Exit status: 0 something hides, 1 nothing does, 2 it failed, 3 hiding cannot be verified here.",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Examine this host. The exit status says whether any kind of RAM hides."""
    from offmap import __version__
    from offmap.audit.host import host_facts
    from offmap.doctor import Diagnosis, examine, exit_status
    from offmap.memory.backend import BACKENDS

    width = max(map(len, BACKENDS)) + 2
    found: list[Diagnosis] = []
    for diagnosis in examine():
        found.append(diagnosis)
        if not args.json:
            print(f"{diagnosis.backend + ':':<{width}}{diagnosis.health.value}", flush=True)
            for label, text in (("", diagnosis.reason), ("do: ", diagnosis.remedy)):
                if text:
                    print(f"{'':<{width}}{label}{text}", flush=True)
    if args.json:
        result = {
            "schema": "offmap-doctor/1",
            "offmap": __version__,
            "host": host_facts().to_json(),
            "backends": [
                {
                    "backend": d.backend,
                    "promises_to_hide": d.promises,
                    "health": d.health.name.lower(),
                    "reason": d.reason,
                    "remedy": d.remedy,
                }
                for d in found
            ],
        }
        print(json.dumps(result, indent=2))
    return exit_status(found)
