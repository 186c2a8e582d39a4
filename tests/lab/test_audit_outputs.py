"""What the audit writes of real memory on a real kernel: of the published schema, and the same in each form."""

import json
import re

import jsonschema
import pytest
from prometheus_client.parser import text_string_to_metric_families

from offmap.audit.canary import new_key
from offmap.audit.result_sets import audit_schema
from offmap.lab.host import LabHost

from . import prepared

pytestmark = pytest.mark.lab

MIB = 16


@pytest.mark.parametrize(("kind", "verdict", "status"), [("anon", "exposed", 1), ("reserved", "hidden", 0)])
def test_each_form_says_the_same(lab_host: LabHost, kind: str, verdict: str, status: int) -> None:
    files = {"--prometheus": "/tmp/offmap.prom", "--html": "/tmp/audit.html"}
    options = ["--json", *(word for pair in files.items() for word in pair)]
    done = prepared.run(lab_host, "tests.lab.audit_target", kind, new_key(), str(MIB), *options)
    assert done.status == status, done.stderr
    result = json.loads(done.stdout)
    jsonschema.Draft202012Validator(audit_schema()).validate(result)
    assert result["verdict"] == verdict
    cells = result["physical"]["cells"]
    assert sum(cell["guest_pages"] for cell in cells) == result["pages"]["pages_populated"] == (MIB << 20) // 4096

    metrics, page = (lab_host.output(["cat", path]).stdout.decode() for path in files.values())
    states = {
        sample.labels["state"]: sample.value
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
        if family.name == "offmap_guest_ram_bytes"
    }
    assert states.pop(verdict) == MIB << 20 and set(states.values()) == {0}

    assert f'<section class="verdict v-{verdict}">' in page
    assert result["host"]["kernel"] in page and result["process"] in page
    drawn = set(re.findall(r'class="c f-([a-z-]+)" data-i=', page))
    assert drawn == {"direct" if verdict == "exposed" else "hidden"}
    modes = lab_host.output(["stat", "-c", "%a", *files.values()]).stdout.decode().split()
    assert modes == ["644", "600"]
