"""The words of a result for what confines the VMM's process. No verdict rests on them."""

from enum import StrEnum
from typing import Annotated

from offmap.report.typed import Count, Document, one_of

LISTED = 64  # descriptors that a result names
NOT_LOOKED_AT = "not looked at"


class Seccomp(StrEnum):
    """The mode of a thread's system call filter (/proc/PID/status)."""

    NONE = "none"
    STRICT = "strict"
    FILTER = "filter"


class Descriptor(Document, frozen=True):
    """An open file that leads further than a VMM's own guest and devices.

    Attributes:
        fd: Its number.
        kind: physical memory, /dev/kvm, /dev/offmap, directory, userfaultfd, bpf, io_uring, perf_event, pidfd; or
            not looked at: it may be any of these, but its file system may not answer who asks.
        link: What /proc/PID/fd says that it is.
        access: read, write, both, or path (O_PATH); empty if it is not known.
    """

    fd: Count
    kind: str
    link: str
    access: str


class VmmSandbox(Document, frozen=True):
    """What confines the VMM's process, as the kernel tells it in /proc: of several threads, what the least confined one
    has.

    Attributes:
        uid: Effective user id, as the auditor's user namespace counts.
        threads: Threads that run the VMM's program.
        kernel_threads: Threads of the process that run in the kernel only (vhost's, KVM's).
        capabilities: Those that a thread has, or may take (permitted), in its user namespace.
        no_new_privs: Whether no thread can gain privileges by exec.
        seccomp: none, strict or filter.
        seccomp_filters: The fewest filters that a thread has; null where the kernel does not tell.
        namespaces: Kinds of namespaces that are other than the auditor's.
        shared_namespaces: Kinds that are the auditor's. A kind in neither could not be read.
        mounts: Mounts that it sees; null if they cannot be read.
        root: File system of its root, and whether that is read-only; empty if it cannot be read.
        dumpable: Whether others with its user id may look into it; null if that cannot be told (uid 0).
        descriptors: Open files that lead further than its guest and devices.
        descriptors_omitted: Entries left out of descriptors.
    """

    uid: Count
    threads: Count
    kernel_threads: Count
    capabilities: tuple[str, ...]
    no_new_privs: bool
    seccomp: Annotated[str, one_of(Seccomp)]
    seccomp_filters: Count | None
    namespaces: tuple[str, ...]
    shared_namespaces: tuple[str, ...]
    mounts: Count | None
    root: str
    dumpable: bool | None
    descriptors: tuple[Descriptor, ...]
    descriptors_omitted: Count

    def __str__(self) -> str:
        """One line, most telling first."""
        dumpable = {True: "dumpable", False: "not dumpable", None: ""}[self.dumpable]
        mounts = "" if self.mounts is None else f"{self.mounts} mount{'' if self.mounts == 1 else 's'}"
        root = f"root {self.root} ({mounts})" if self.root and mounts else mounts
        some = ", ".join(self.capabilities[:6]) + (", …" if len(self.capabilities) > 6 else "")
        parts = [
            f"uid {self.uid}",
            f"{len(self.capabilities)} capabilities ({some})" if self.capabilities else "no capabilities",
            "no_new_privs" if self.no_new_privs else "may gain privileges",
            "no seccomp filter" if self.seccomp == Seccomp.NONE else f"seccomp {self.seccomp}",
            f"own namespaces {' '.join(self.namespaces)}" if self.namespaces else "no namespace of its own",
            root,
            dumpable,
            self._open_files,
        ]
        return ", ".join(filter(None, parts))

    @property
    def _open_files(self) -> str:
        unseen = sum(each.kind == NOT_LOOKED_AT for each in self.descriptors)
        kinds = [each.kind for each in self.descriptors if each.kind != NOT_LOOKED_AT]
        count = len(kinds) + self.descriptors_omitted
        text = "no descriptor that leads further"
        if count:
            several = count > 1
            names = ", ".join(sorted(set(kinds)))
            text = f"{count} descriptor{'s' * several} that lead{'' if several else 's'} further ({names})"
        return f"{text}, {unseen} not looked at" if unseen else text
