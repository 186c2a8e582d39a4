"""Measure cells on the host that they are about: ``python -m offmap.compare.measure [JOB]`` (offmap.compare.job)."""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from offmap.compare.cell_result import CellOutcome
from offmap.compare.facts import this_host
from offmap.compare.job import Job, Line
from offmap.compare.kinds import Vmm, kind_of
from offmap.compare.probes.survey import Survey
from offmap.errors import BackendRefused, OffmapError


def _measure(job: Job, folder: Path, survey: Survey) -> None:
    kind = kind_of(job.spec.backend)
    if why := kind.clock_refusal(job.spec.kvm_clock):
        raise BackendRefused(f"kvm_clock={job.spec.kvm_clock} is not to be had of this VMM", why, "use kvm_clock=auto")
    if kind.vmm is Vmm.LIBVIRT:
        from offmap.compare.libvirt_host import set_up

        survey.stage("installing libvirt into this host")
        job = set_up(job, folder)
    if job.preset.questions:
        from offmap.compare.first_look import first_look

        first_look(job, folder, survey)
        return
    # Here, as an emulated host takes a second or more to import all of it.
    from offmap.compare.probes.prepared_host import PreparedHost
    from offmap.compare.whole_cell import WholeCell

    survey.stage("preparing the host")
    with PreparedHost(job, folder) as host:
        WholeCell(host, survey).run()


def _answer(text: str | bytes) -> None:
    """Measure the cell that a job describes, and say how that ended."""
    survey = Survey()
    survey.say(Line(host=this_host()))
    job = msgspec.json.decode(text, type=Job)
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) and not job.native else job.folder
    outcome, reason = CellOutcome.BOOTED, ""
    try:
        with tempfile.TemporaryDirectory(prefix="offmap-measure-", dir=place) as folder:
            _measure(job, Path(folder), survey)
    except BackendRefused as error:
        outcome, reason = CellOutcome.REFUSED, str(error)
    except OffmapError as error:
        outcome, reason = CellOutcome.FAILED, str(error)
    survey.say(Line(outcome=outcome, reason=reason))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the cell that the only argument describes; without one, those that the lines of the input describe."""
    argv = sys.argv[1:] if arguments is None else arguments
    for text in argv or sys.stdin.buffer:
        _answer(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
