"""drgn, where it is not there."""

import os
import sys

import pytest

from offmap.audit.audit import audit_process
from offmap.audit.oracle import Sample
from offmap.errors import ExitStatus, OffmapError


def test_without_drgn_the_audit_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "drgn", None)
    with pytest.raises(OffmapError, match=r"offmap\[oracle\]") as caught:
        audit_process(os.getpid(), oracle=Sample())
    assert caught.value.exit_status is ExitStatus.FAILED
