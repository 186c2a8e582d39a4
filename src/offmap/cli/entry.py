"""The command line's way in. A VMM that is wrapped does not wait for what the other commands import."""

import sys

from offmap import quick_imports


def run(words: list[str]) -> int:
    """Run the command line of these words. Return the exit status."""
    quick_imports.begin()
    if words[:1] == ["wrap"] and None not in (sys.stdin, sys.stdout, sys.stderr):
        from offmap.cli.wrap import begin

        try:
            begin(words[1:])
        except BaseException as error:
            from offmap.cli.main import report

            return report("wrap", error)
    from offmap.cli.main import main

    return main(words)
