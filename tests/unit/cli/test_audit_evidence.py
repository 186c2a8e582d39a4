"""``--evidence`` leaves a file of this audit or none, and ``--verify`` ends with the status of what is stated."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from offmap.audit.evidence.verify import DOCUMENTS
from offmap.audit.result_sets import audit_schema
from offmap.audit.verdict import Verdict
from offmap.cli.main import main
from offmap.errors import Undetermined

from ..audit.evidence.samples import Keys
from .test_audit_output import audit, result

__all__ = ["audit"]  # a fixture


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path, "key")


@pytest.mark.parametrize(("verdict", "status"), [(Verdict.HIDDEN, 0), (Verdict.EXPOSED, 1), (Verdict.UNKNOWN, 3)])
@pytest.mark.parametrize("which", ["1", "--all"])
def test_made_and_verified(
    audit: Any, keys: Keys, tmp_path: Path, capsys: Any, verdict: Verdict, status: int, which: str
) -> None:
    file = tmp_path / "evidence"
    audit(result(verdict))
    signing = ["--evidence-key", str(keys.private), "--nonce", "n1"]
    assert main(["audit", which, "--json", "--evidence", str(file), *signing]) == status
    report = capsys.readouterr().out
    known = ["--evidence-key", str(keys.public), "--nonce", "n1"]
    assert main(["audit", "--verify", str(file), *known, "--json"]) == status
    found = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator(audit_schema(DOCUMENTS)).validate(found)
    assert found["accepted"] and found["verdict"] == verdict.value
    digest = next(check["detail"] for check in found["checks"] if check["what"] == "report")
    assert digest.endswith(hashlib.sha256(report.encode()).hexdigest())
    assert main(["audit", "--verify", str(file), *known[:-1], "n2"]) == 2
    assert capsys.readouterr().out.startswith("REFUSED")


def test_an_audit_that_fails_leaves_no_evidence(audit: Any, keys: Keys, tmp_path: Path) -> None:
    file = tmp_path / "evidence"
    options = ["--evidence", str(file), "--evidence-key", str(keys.private)]
    audit(result(Verdict.HIDDEN))
    assert main(["audit", "1", *options]) == 0
    assert file.exists()
    audit(Undetermined("no kcore"))
    assert main(["audit", "1", *options]) == 3
    assert not file.exists()


@pytest.mark.parametrize(
    "options",
    [
        ["1", "--evidence", "FILE"],
        ["1", "--evidence-key", "KEY"],
        ["1", "--nonce", "n"],
        ["1", "--policy", "FILE"],
        ["1", "--evidence", "FILE", "--evidence-key", "KEY", "--nonce", ""],
        ["1", "--evidence", "FILE", "--evidence-key", "KEY", "--nonce", "a\x1b"],
        ["1", "--evidence", "FILE", "--evidence-key", "KEY", "--watch", "1"],
        ["1", "--evidence", "FILE", "--evidence-key", "PUBLIC"],
        ["1", "--evidence", "FILE", "--evidence-key", "FILE"],
        ["--verify", "FILE", "--evidence-key", "KEY"],
        ["--verify", "FILE"],
        ["--verify", "FILE", "--evidence-key", "PUBLIC", "--evidence", "FILE"],
    ],
)
def test_used_wrongly(audit: Any, keys: Keys, tmp_path: Path, capsys: Any, options: list[str]) -> None:
    audit(result(Verdict.HIDDEN))
    (tmp_path / "file").write_text("mine")
    names = {"FILE": str(tmp_path / "file"), "KEY": str(keys.private), "PUBLIC": str(keys.public)}
    assert main(["audit", *(names.get(word, word) for word in options)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert (tmp_path / "file").read_text() == "mine"
