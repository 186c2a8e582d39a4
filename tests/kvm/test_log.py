"""What a service reads of a guest's VMM: each line of standard error is one JSON object, its audit's too."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("kvm")]


@pytest.mark.parametrize("audit", ["once", "watch"])
def test_every_line_is_an_object(payload: Callable[[str], Path], audit: str) -> None:
    options = ["-v", "--log-format", "json", "run", "--kernel", str(payload("monitor")), f"--audit={audit}", "--stats"]
    with subprocess.Popen(
        [sys.executable, "-m", "offmap", *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin and process.stderr
        records = []
        for line in process.stderr:
            records.append(json.loads(line))
            if records[-1]["logger"] == "offmap.cli.audit":  # it has come to something
                process.stdin.write("q")
                process.stdin.close()
                break
        records += [json.loads(line) for line in process.stderr]
    by_logger = {record["logger"] for record in records}
    assert {"offmap.cli.run", "offmap.cli.audit", "offmap.hide"} <= by_logger
    assert {record["level"] for record in records} <= {"debug", "info", "error"}
    assert process.returncode in {1, 3}  # exposed, or there was no right to see
