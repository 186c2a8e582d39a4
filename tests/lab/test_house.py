"""What CONTRIBUTING's recipes add works: a guest boots on that RAM and finds the device; the question is asked."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from offmap.lab.host import LabHost

pytestmark = pytest.mark.lab

OFFMAP = [sys.executable, "-m", "offmap"]


@pytest.fixture
def environment(house: Any, lab_out: Path) -> dict[str, str]:
    """Give the environment of commands in the shared host, where the changed tree is the output folder's."""
    shutil.copytree(house.tree / "src", lab_out / "house")
    return {**house.environment, "PYTHONPATH": str(lab_out / "house")}


def test_a_guest_on_the_ram_finds_the_device(lab_host: LabHost, environment: dict[str, str]) -> None:
    subprocess.run([*OFFMAP, "image", "build"], check=True)
    doctor = lab_host.output([*OFFMAP, "doctor"], env=environment)
    assert b"lent:                 usable, and does not hide\n" in doctor.stdout, doctor.stderr.decode()
    job = "cat /sys/bus/virtio/devices/*/device"
    options = ["--memory", "lent", "--dice", "sides=6", "--audit", "--exec", job]
    done = lab_host.output([*OFFMAP, "run", *options], env=environment)
    assert b"0x003f\n" in done.stdout, done.stderr.decode()
    assert done.status == 125 and b"EXPOSED" in done.stderr, done.stderr.decode()  # as promised: it does not hide
    wrong = lab_host.output([*OFFMAP, "run", "--dice", "6", "--exec", job], env=environment)
    assert wrong.stderr.decode() == "offmap run: '6' is no die; write sides=6\n"


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_the_question_is_asked(house: Any, tmp_path: Path) -> None:
    command = [*OFFMAP, "compare", "--backend", "lent", "--boots", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, env=house.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (cell,) = (json.loads(path.read_text()) for path in (tmp_path / "cells").glob("*.json"))
    assert {answer["question"]: answer["value"] for answer in cell["answers"]}["works.uptime"] is True
    assert "uptime" in (tmp_path / "report.md").read_text()
