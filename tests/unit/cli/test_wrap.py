"""The options of ``offmap wrap``, which are read twice: quickly where they are plain, and else by argparse."""

import pytest

from offmap.cli.main import main
from offmap.cli.wrap import begin
from offmap.wrap import start


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Give what VMMs would be started with."""
    found: list[object] = []

    def run(argv: object, memory: str, policy: object, *, verbose: bool, as_json: bool) -> int:
        found.append((argv, memory, vars(policy), verbose, as_json))
        return 0

    monkeypatch.setattr(start, "run", run)
    return found


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--memory pool",
        "--memory=unplugged,node=1",
        "--trust-shared --on-exposed warn --on-exposed=kill",
        "--on-exposed=warn --on-undetermined kill --kvm-clock keep",
    ],
)
def test_plain_options_are_read_as_argparse_reads_them(options: str, started: list[object]) -> None:
    words = [*options.split(), "--", "vmm", "--memory", "1G", "--", "-v"]
    begin(words)
    main(["wrap", *words])
    assert len(started) == 2
    assert started[0] == started[1]


@pytest.mark.parametrize(
    "words",
    [
        "--help",
        "-v -- vmm",
        "--mem pool -- vmm",
        "--memory -- vmm",
        "--memory --",
        "--memory= -- vmm",
        "--on-exposed=ask -- vmm",
        "--trust-shared=yes -- vmm",
        "vmm --option",
        "--",
        "",
    ],
)
def test_what_is_not_plain_is_left_to_argparse(words: str, started: list[object]) -> None:
    begin(words.split())
    assert not started
