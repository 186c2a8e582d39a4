"""offmap: KVM guests whose memory the host kernel does not map, and the proof of it.

The names in ``__all__`` are the library (docs/library.md). All others are private: they may change at any time. A name
is imported when it is first used: ``import offmap`` starts nothing and changes nothing in the process.
"""

__version__ = "0.1.0"

_PUBLIC = {  # and in __init__.pyi, for type checkers
    "AuditResult": "offmap.audit.result",
    "BackendRefused": "offmap.errors",
    "BootSource": "offmap.boot.linux",
    "CellOutcome": "offmap.compare.cell_result",
    "CellResult": "offmap.compare.cell_result",
    "Completed": "offmap.lab.command",
    "Diagnosis": "offmap.doctor",
    "EveryVm": "offmap.audit.result_sets",
    "ExitStatus": "offmap.errors",
    "Health": "offmap.doctor",
    "JobResult": "offmap.library",
    "KernelError": "offmap.errors",
    "LabHost": "offmap.lab.host",
    "Machine": "offmap.machine",
    "MachineConfig": "offmap.vmm.config",
    "NotAudited": "offmap.hide",
    "OffmapError": "offmap.errors",
    "Outcome": "offmap.vmm.outcome",
    "Stop": "offmap.vmm.outcome",
    "Undetermined": "offmap.errors",
    "Verdict": "offmap.audit.verdict",
    "Vet": "offmap.hide",
    "audit_host": "offmap.library",
    "audit_process": "offmap.audit.audit",
    "lab_host": "offmap.library",
    "list_backends": "offmap.library",
    "parse_backend": "offmap.memory.backend",
    "run_job": "offmap.library",
    "run_matrix": "offmap.library",
}

__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604 - the keys are strings


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'offmap' has no attribute {name!r}")
    from importlib import import_module

    return globals().setdefault(name, getattr(import_module(_PUBLIC[name]), name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
