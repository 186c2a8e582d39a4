"""The process beside a wrapped VMM: it serves the VMM's calls one after the other, and sleeps in between."""

import errno
import select
import time

from offmap.errors import OffmapError
from offmap.log import Logger
from offmap.uapi import kvm
from offmap.uapi import ptrace as tracing
from offmap.wrap import cpuid, footprint, slots
from offmap.wrap.audits import Audit
from offmap.wrap.listener import Call, CallGone, Listener
from offmap.wrap.policy import Policy
from offmap.wrap.source import Source
from offmap.wrap.stopped import Stopped
from offmap.wrap.vmms import Vmm, Vmms

_XEN = {kvm.KVM_XEN_HVM_CONFIG, kvm.KVM_XEN_HVM_SET_ATTR, kvm.KVM_XEN_VCPU_SET_ATTR}
_XEN_MAPS = "it would map the pages that they share"

_log = Logger("offmap.cli.wrap")


class Supervisor:
    """Serves a listener until nobody is left who could call."""

    def __init__(self, listener: Listener, source: Source, policy: Policy) -> None:
        self._listener = listener
        self._source = source
        self._policy = policy
        self._vmms = Vmms()
        self._audit: tuple[Audit, Vmm] | None = None

    def serve(self) -> None:
        """Run until the last process under the filter has ended."""
        try:
            while self._serve_events():
                pass
        finally:
            if self._audit is not None:
                self._audit[0].close()

    def _serve_events(self) -> bool:
        """Wait for what comes next, and do it. Whether there may be more."""
        poll = select.poll()
        poll.register(self._listener.fd, select.POLLIN)
        due = None
        if self._audit is not None:
            poll.register(self._audit[0].fd, select.POLLIN)
        else:
            due = self._vmms.next()
            if due is None:
                footprint.trim()
        events = dict(poll.poll(None if due is None else int(due[1] * 1000) + 1))
        if events.get(self._listener.fd, 0) & select.POLLIN:
            self._serve_one()
        elif self._listener.fd in events:
            return False
        elif self._audit is not None and events:
            self._judge(*self._audit)
            self._audit = None
        elif due is not None and not due[0].seconds_left():
            due[0].audit_begins()
            self._audit = Audit(due[0].pid), due[0]
        return True

    def _serve_one(self) -> None:
        """Serve one call, if one waits. A call that cannot be served as it should fails with EPERM."""
        try:
            call = self._listener.receive()
        except CallGone:
            return
        try:
            self._answer(call)
        except CallGone:
            return
        except OffmapError as error:
            _log.warning("refused: %s", error)
            try:
                self._listener.fail(call, errno.EPERM)
            except CallGone:
                return

    def _answer(self, call: Call) -> None:
        if not call.native:
            raise OffmapError("the VMM called KVM by another ABI than x86-64's", "use a 64-bit build of it")
        with Stopped(self._listener, call) as stopped:
            try:
                self._serve(call, stopped)
            except OffmapError as error:
                _log.warning("refused: %s", error)
                stopped.fail(errno.EPERM)

    def _serve(self, call: Call, stopped: Stopped) -> None:
        if call.command in {kvm.KVM_SET_USER_MEMORY_REGION, kvm.KVM_SET_USER_MEMORY_REGION2}:
            self._set_slot(call, stopped)
        elif call.command == kvm.KVM_GET_SUPPORTED_CPUID:
            if stopped.let_run() == 0:
                cpuid.edit(stopped.pid, call.argument)
        elif call.command == kvm.KVM_CREATE_VCPU:
            self._create_vcpu(stopped)
        elif call.command == kvm.KVM_SET_CPUID2:
            self._set_cpuid(call, stopped)
        elif call.command in _XEN:
            raise OffmapError("KVM cannot be Xen for a guest on hidden memory", "turn that off", why=_XEN_MAPS)
        else:
            raise OffmapError("the VMM sets CPUID by KVM_SET_CPUID, which is not handled", "use a newer VMM")

    def _set_slot(self, call: Call, stopped: Stopped) -> None:
        areas = slots.to_place(call, stopped.pid, trust_shared=self._policy.trust_shared)
        if areas:
            began = time.monotonic()
            placed = slots.place(stopped, self._listener, call, areas, self._source)  # and the call comes again
            _log.debug("process %d: %d KiB placed in %.2f s", stopped.pid, placed >> 10, time.monotonic() - began)
        else:
            stopped.let_run()
        self._vmms.called(stopped.pid)

    @staticmethod
    def _create_vcpu(stopped: Stopped) -> None:
        vcpu = stopped.let_run()
        if vcpu >= 0 and (result := cpuid.enforce(stopped, vcpu)) < 0:
            stopped.inject(tracing.SYS_close, vcpu)
            why = f"KVM_CAP_ENFORCE_PV_FEATURE_CPUID: {errno.errorcode.get(-result, result)}"
            raise OffmapError("the guest cannot be kept from kvm-clock", "use a newer kernel", why=why)

    def _set_cpuid(self, call: Call, stopped: Stopped) -> None:
        cpuid.edit(stopped.pid, call.argument)
        stopped.let_run()
        if stopped.pid in self._vmms:
            self._vmms.called(stopped.pid)

    def _judge(self, audit: Audit, vmm: Vmm) -> None:
        """Tell what an audit said, and act on it."""
        with audit:
            answer = audit.answer()
        if not vmm.alive():
            return
        ends = self._policy.ends(answer.status)
        if not ends:
            _log.info("process %d: %s", vmm.pid, answer.line)
            return
        _log.warning("process %d: %s; it is ended (%s=warn leaves it)", vmm.pid, answer.line, ends)
        vmm.kill()
