"""The command line of the attack: the schema, and what is refused before anything is read."""

import json
from pathlib import Path

import pytest

from offmap.attack.knowledge import Kernel
from offmap.cli.main import main

DIGEST = "0" * 64


@pytest.fixture
def learnt(tmp_path: Path) -> str:
    """Give a file that says what is known of a kernel: nothing but its name."""
    kernel = Kernel(banner="Linux version 6.12.0", symbols={}, offsets={}, sizes={}, arrays={})
    path = tmp_path / "learnt.json"
    path.write_text(json.dumps(kernel.to_json()))
    return str(path)


def test_the_schema_needs_no_guest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attack", "--json-schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "offmap attack"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "no guest to attack"),
        (["1", "--secret", "short"], "is no SHA-256"),
        (["1", "--secret", DIGEST, "--target", "else"], "there is no target"),
        (["1", "--secret", DIGEST, "--pieces", "00"], "does not have 8 bytes"),
        (["1", "--secret", DIGEST, "--pieces", "secret"], "no hexadecimal digits"),
        (["1", "--secret", DIGEST, "--control", "one:two"], "is no control"),
        (["1", "--secret", DIGEST, "--control", f"1:{DIGEST}"], "cannot be its own control"),
        (["1", "--secret", DIGEST, "--html", "/dev/full"], "/dev/full is not a file"),
        (["1", "--secret", DIGEST, "--html", "/nowhere/page.html"], "making a file in /nowhere failed"),
        (["1", "--secret", DIGEST, "--kaslr", "high"], "is no address"),
        (["1", "--secret", DIGEST, "--error-rate", "0.7"], "a leak cannot be like that"),
        (["1", "--secret", DIGEST, "--user-memory"], "take --primitive module"),
    ],
)
def test_what_is_refused(words: list[str], why: str, learnt: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attack", "--host-kernel", learnt, *words]) == 2
    out, errors = capsys.readouterr()
    assert out == "" and why in errors and errors.count("\n") == 1
