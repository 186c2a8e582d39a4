"""What the kernel maps at changing addresses, or for microseconds, is never called hidden: a share of many audits."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from offmap.lab.host import LabHost
from offmap.lab.provision import host_kernel
from offmap.patience import scaled

from .alias_module import alias_module
from .conftest import RESERVED, keep_still

pytestmark = pytest.mark.lab

ROOT, TARGET = Path(__file__).parents[2], "tests.lab.moving_target"
PATIENCE = 120.0  # seconds on an idle machine


def test_a_page_that_moves_is_exposed_each_time(lab_host: LabHost, lab_out: Path) -> None:
    module = lab_out / "offmap_alias.ko"
    shutil.copy(alias_module(lab_host.kernel), module)
    assert lab_host.output(["insmod", str(module)]).status == 0
    try:
        done = lab_host.output([sys.executable, "-m", TARGET, "page", "3", "1"], timeout=scaled(PATIENCE), cwd=ROOT)
    finally:
        assert lab_host.output(["rmmod", "offmap_alias"]).status == 0
    assert done.status == 0, done.stderr.decode()
    assert json.loads(done.stdout) == {"attackers": {"exposed": 3}}


@pytest.mark.slow
def test_a_guest_that_runs_guests_is_never_hidden(tmp_path: Path) -> None:
    with LabHost.start(host_kernel("debian:7.3"), memory="2G", cmdline=RESERVED, out=tmp_path) as host:
        keep_still(host)
        done = host.output([sys.executable, "-m", TARGET, "nested", "1", "1", "3"], timeout=scaled(PATIENCE), cwd=ROOT)
    assert done.status == 0, done.stderr.decode()
    found = json.loads(done.stdout)
    verdicts = found["attackers"]
    assert set(verdicts) <= {"exposed", "unknown"} and sum(verdicts.values()) == 3, found
    assert (found["honest"], found["ordinary"]) == ({"hidden": 1}, {"exposed": 1}), found
