from offmap.audit.audit import AuditResult as AuditResult
from offmap.audit.audit import audit_process as audit_process
from offmap.audit.every_vm import EveryVm as EveryVm
from offmap.audit.verdict import Verdict as Verdict
from offmap.compare.cell_result import CellOutcome as CellOutcome
from offmap.compare.cell_result import CellResult as CellResult
from offmap.compare.doctor import Diagnosis as Diagnosis
from offmap.compare.doctor import Health as Health
from offmap.errors import BackendRefused as BackendRefused
from offmap.errors import ExitStatus as ExitStatus
from offmap.errors import KernelError as KernelError
from offmap.errors import OffmapError as OffmapError
from offmap.errors import Undetermined as Undetermined
from offmap.lab.host import Completed as Completed
from offmap.lab.host import LabHost as LabHost
from offmap.library import JobResult as JobResult
from offmap.library import audit_host as audit_host
from offmap.library import lab_host as lab_host
from offmap.library import list_backends as list_backends
from offmap.library import run_job as run_job
from offmap.library import run_matrix as run_matrix

__version__: str
