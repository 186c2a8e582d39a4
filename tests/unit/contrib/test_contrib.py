"""What is handed out for fleets fits what the audit writes: units, alerts, plays, and the page that explains them."""

import configparser
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from offmap.audit.report.hosts import parse_report
from offmap.audit.report.prometheus import LISTED, render_prometheus
from offmap.patience import scaled

from ..audit.report.samples import every_vm, exposed, not_audited, scan

PROJECT = Path(__file__).parents[3]
UNITS = PROJECT / "contrib" / "systemd"
MOUNT = PROJECT / "contrib" / "pool" / "run-hidden.mount"
RULES = PROJECT / "contrib" / "prometheus" / "offmap.rules.yml"
PLAYS = sorted((PROJECT / "contrib" / "ansible").glob("*.yml"))
FLEET = PROJECT / "docs" / "fleet.md"


def command(name: str, missed: str) -> str:
    """Where a tool is; skips the test where it is not, and says what was not tested."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name}: {missed}")
    return found


def run(*words: str | Path) -> None:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, timeout=scaled(60))
    assert done.returncode == 0 and not done.stderr.strip(), done.stdout + done.stderr


def unit(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(path)
    return parser


def series() -> dict[str, set[str]]:
    """Names of labels by metric, of a report that has all there is."""
    document = exposed(scan=scan(1))
    document["pages"]["canaries_found"] = 1
    text = render_prometheus([parse_report(every_vm(document, not_audited=[not_audited()]))])
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


# systemd


def test_systemd_takes_the_units() -> None:
    analyze = command("systemd-analyze", "the units were not verified by systemd itself")
    run(analyze, "verify", *UNITS.iterdir(), MOUNT)


def test_the_service_may_do_what_the_audit_needs() -> None:
    service = unit(UNITS / "offmap-audit.service")["Service"]
    assert "offmap audit --all" in service["ExecStart"] and "--prometheus ${TEXTFILE}" in service["ExecStart"]
    # Findings are no failures; a failure is one.
    assert service["SuccessExitStatus"].split() == ["1", "3"]
    needed = {"CAP_SYS_RAWIO", "CAP_SYS_ADMIN", "CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE", "CAP_SYSLOG"}
    assert set(service["CapabilityBoundingSet"].split()) == needed
    # Each of these hides /proc/kcore, /dev/offmap or the VMMs (systemd.exec(5)).
    blinding = {"ProtectKernelTunables", "PrivateDevices", "ProtectClock", "ProtectProc", "ProcSubset", "PrivateUsers"}
    assert not blinding & set(service)


def test_an_audit_is_stale_only_after_several_were_missed() -> None:
    timer = unit(UNITS / "offmap-audit.timer")["Timer"]
    minutes = int(timer["OnUnitInactiveSec"].removesuffix("min")) + int(timer["RandomizedDelaySec"].removesuffix("min"))
    (stale,) = [rule["expr"] for rule in rules() if rule["alert"] == "OffmapAuditStale"]
    assert int(stale.split(">")[1]) >= 3 * 60 * minutes


def test_a_pool_is_mounted_by_options_that_there_are() -> None:
    mount = unit(MOUNT)["Mount"]
    assert MOUNT.name == f"{mount['Where'].strip('/').replace('/', '-')}.mount"
    module = (PROJECT / "kernel" / "module" / "poolfs.c").read_text()
    known = set(re.findall(r'fsparam_\w+\("(\w+)"', module)) | {"nosuid", "nodev", "noexec"}
    assert {option.partition("=")[0] for option in mount["Options"].split(",")} <= known
    assert f'.name = "{mount["Type"]}"' in module


# Prometheus


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def test_prometheus_takes_the_rules_and_they_fire() -> None:
    promtool = command("promtool", "the rules were read as YAML, but not run by Prometheus itself")
    run(promtool, "check", "rules", RULES)
    run(promtool, "test", "rules", RULES.with_name("offmap.rules.test.yml"))


def test_rules_ask_for_what_is_written() -> None:
    known = series()
    asked = set()
    for rule in rules():
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert {"summary", "description"} == set(rule["annotations"])
        for name, matchers in re.findall(r"(offmap_\w+)(?:\{([^}]*)\})?", rule["expr"]):
            asked.add(name)
            assert name in known, rule["expr"]
            assert set(re.findall(r"(\w+)=", matchers)) <= known[name], rule["expr"]
        assert rule["expr"].count("(") == rule["expr"].count(")")
        labels = set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"])))
        assert labels <= {"instance"}.union(*known.values())
    assert asked >= {"offmap_guest_ram_bytes", "offmap_audit_timestamp_seconds", "offmap_audit_success"}


# Ansible


@pytest.mark.parametrize("play", PLAYS, ids=lambda play: play.name)
def test_ansible_takes_the_plays(play: Path) -> None:
    run(command("ansible-playbook", "the plays were read as YAML only"), "-i", "localhost,", "--syntax-check", play)


def test_plays_install_the_units_there_are() -> None:
    content = {play.name: yaml.safe_load(play.read_text()) for play in PLAYS}
    (copy,) = [task for task in content["install.yml"][0]["tasks"] if "loop" in task]
    assert sorted(copy["loop"]) == sorted(each.name for each in UNITS.iterdir())
    audit = next(task for task in content["audit.yml"][0]["tasks"] if task["name"] == "Audit")
    assert audit["ansible.builtin.command"]["argv"][1:] == ["audit", "--all", "--json", "--no-progress"]
    assert "[0, 1, 3]" in audit["failed_when"]


# docs/fleet.md


def test_the_page_names_each_metric_with_its_labels() -> None:
    known = series()
    rows = re.findall(r"^\| (`offmap_.*?) \| ?([a-z_, ]*?) ?\|", FLEET.read_text(), re.MULTILINE)
    said = {
        name: set(filter(None, labels.split(", "))) for names, labels in rows for name in re.findall(r"`(\w+)`", names)
    }
    assert said == known
    assert f"beyond the {LISTED} gravest" in FLEET.read_text()


def test_the_page_leads_to_files_there_are() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", FLEET.read_text()):
        assert (FLEET.parent / target).exists(), target
