"""The process beside a wrapped VMM: it serves the VMM's calls one after the other, and sleeps in between."""

import ctypes
import errno
import select
import time

from offmap.errors import OffmapError
from offmap.log import DEBUG, Logger, is_taken
from offmap.uapi import kvm
from offmap.uapi import ptrace as tracing
from offmap.wrap import address_space, cpuid, footprint, slots
from offmap.wrap.audits import Answer, Audit, answer_of
from offmap.wrap.clock import Waiting, boots_linux, words_for
from offmap.wrap.listener import Call, CallGone, Listener
from offmap.wrap.policy import Policy
from offmap.wrap.source import Source
from offmap.wrap.stopped import Stopped, process_of
from offmap.wrap.vmms import Vmm, Vmms

_XEN = {kvm.KVM_XEN_HVM_CONFIG, kvm.KVM_XEN_HVM_SET_ATTR, kvm.KVM_XEN_VCPU_SET_ATTR}
_XEN_MAPS = "it would map the pages that they share"

_log = Logger("offmap.cli.wrap")
_UNUSED = 10.0  # seconds without a memory slot after which that is said
_LOOK_AGAIN = 5  # milliseconds, at a guest that has not begun yet


class Supervisor:
    """Serves a listener until nobody is left who could call."""

    def __init__(self, listener: Listener, source: Source, policy: Policy) -> None:
        self._listener = listener
        self._source = source
        self._policy = policy
        self._vmms = Vmms()
        self._audit: tuple[Audit, Vmm] | None = None
        self._untrimmed = False
        self._unused: float | None = time.monotonic() + _UNUSED  # None: a slot has been set, or its lack told

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
            left = self._audit[0].patience()
        else:
            due = self._vmms.next()
            left = due[1] if due is not None else self._unused and max(0.0, self._unused - time.monotonic())
        waiting = self._vmms.waiting()
        timeout = None if left is None else int(left * 1000) + 1
        if waiting:
            timeout = _LOOK_AGAIN if timeout is None else min(timeout, _LOOK_AGAIN)
        elif left is None and self._untrimmed:
            footprint.trim()
            self._untrimmed = False
        events = dict(poll.poll(timeout))
        for vmm in waiting:
            self._tell_clock(vmm)
        if events.get(self._listener.fd, 0) & select.POLLIN:
            self._serve_one()
        elif self._listener.fd in events:
            return False
        elif self._audit is not None:
            if events:
                audit, vmm = self._audit
                with audit:
                    self._judge(audit.answer(), vmm)
                self._audit, self._untrimmed = None, True
            elif self._audit[0].patience() == 0:
                self._audit[0].hurry()
        elif due is None:
            self._tell_unused()
        elif due[0].waiting is None and not due[0].seconds_left():
            self._begin_audit(due[0])
        return True

    def _tell_unused(self) -> None:
        """Tell once that no guest is hidden, for there is none of KVM's: its VMM may have another way to run it."""
        if self._unused is not None and time.monotonic() >= self._unused:
            self._unused = None
            _log.warning("nothing is hidden yet: a guest that runs without KVM is not (QEMU needs -accel kvm)")

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
        except (OffmapError, OSError) as error:
            _log.warning("refused: %s", error)
            try:
                self._listener.fail(call, errno.EPERM)
            except CallGone:
                return

    def _answer(self, call: Call) -> None:
        if not call.native:
            raise OffmapError("the VMM called KVM by another ABI than x86-64's", "use a 64-bit build of it")
        if call.command == kvm.KVM_CREATE_VM:
            if (pid := process_of(call.tid)) in self._vmms:
                self._vmms.of(pid).makes_vm()
            self._listener.let_run(call)
            return
        if call.command == kvm.KVM_SET_REGS and not self._boots(call):
            self._listener.let_run(call)
            return
        with Stopped(self._listener, call) as stopped:
            try:
                self._serve(call, stopped)
            except (OffmapError, OSError) as error:
                _log.warning("refused: %s", error)
                stopped.fail(errno.EPERM)

    def _serve(self, call: Call, stopped: Stopped) -> None:
        if call.command in {kvm.KVM_SET_USER_MEMORY_REGION, kvm.KVM_SET_USER_MEMORY_REGION2}:
            self._set_slot(call, stopped)
        elif call.command == kvm.KVM_GET_SUPPORTED_CPUID:
            if stopped.let_run() == 0:
                cpuid.edit(stopped.pid, call.argument, keep_clock=self._policy.keep_clock)
        elif call.command == kvm.KVM_CREATE_VCPU:
            self._create_vcpu(stopped)
        elif call.command == kvm.KVM_SET_CPUID2:
            self._set_cpuid(call, stopped)
        elif call.command == kvm.KVM_SET_REGS:
            self._set_first_registers(call, stopped)
        elif call.command in _XEN:
            raise OffmapError("KVM cannot be Xen for a guest on hidden memory", "turn that off", why=_XEN_MAPS)
        else:
            raise OffmapError("the VMM sets CPUID by KVM_SET_CPUID, which is not handled", "use a newer VMM")

    def _set_slot(self, call: Call, stopped: Stopped) -> None:
        region = slots.region_of(call, stopped.pid)
        vmm = self._vmms.of(stopped.pid)
        areas = slots.to_place(region, stopped.pid, vmm.guards, trust_shared=self._policy.trust_shared)
        if areas:
            began = time.monotonic()
            pieces = slots.place(stopped, self._listener, call, areas, self._source)  # and the call comes again
            for area, piece in zip(areas, pieces, strict=True):
                vmm.placed(area, piece)
            placed = sum(piece.size for piece in pieces) >> 10
            _log.debug("process %d: %d KiB placed in %.2f s", stopped.pid, placed, time.monotonic() - began)
        elif stopped.let_run() == 0:
            vmm.ram.set_slot(call.fd, region)
            self._unused = None
        vmm.called()

    def _create_vcpu(self, stopped: Stopped) -> None:
        vcpu = stopped.let_run()
        if vcpu < 0:
            return
        if is_taken(DEBUG):
            words = words_for(stopped.inject(tracing.SYS_ioctl, vcpu, kvm.KVM_GET_TSC_KHZ, 0))
            _log.debug("process %d: a guest that finds no clock needs: %s", stopped.pid, words)
        if not self._policy.keep_clock and (result := cpuid.enforce(stopped, vcpu)) < 0:
            stopped.inject(tracing.SYS_close, vcpu)
            why = f"KVM_CAP_ENFORCE_PV_FEATURE_CPUID: {errno.errorcode.get(-result, result)}"
            raise OffmapError("the guest cannot be kept from kvm-clock", "use a newer kernel", why=why)

    def _set_cpuid(self, call: Call, stopped: Stopped) -> None:
        cpuid.edit(stopped.pid, call.argument, keep_clock=self._policy.keep_clock)
        stopped.let_run()
        if stopped.pid in self._vmms:
            self._vmms.of(stopped.pid).called()

    def _registers(self, call: Call, pid: int) -> kvm.kvm_regs:
        regs = kvm.kvm_regs()
        address_space.read_into(pid, call.argument, ctypes.addressof(regs), ctypes.sizeof(regs))
        return regs

    def _boots(self, call: Call) -> bool:
        """Whether a guest begins with these registers, and has to be told of its clock."""
        pid = process_of(call.tid)
        if self._policy.keep_clock or pid not in self._vmms or (vmm := self._vmms.of(pid)).waiting is not None:
            return False
        return boots_linux(self._registers(call, pid), vmm.ram)

    def _set_first_registers(self, call: Call, stopped: Stopped) -> None:
        vmm, regs = self._vmms.of(stopped.pid), self._registers(call, stopped.pid)
        if stopped.let_run() == 0 and boots_linux(regs, vmm.ram):
            khz = stopped.inject(tracing.SYS_ioctl, call.fd, kvm.KVM_GET_TSC_KHZ, 0)
            if khz > 0:
                vmm.waits(Waiting(vmm.ram, regs, khz))

    def _tell_clock(self, vmm: Vmm) -> None:
        """Complete the command line of a guest that has come to its first instruction."""
        if vmm.waiting is None or not vmm.alive() or not vmm.guest_runs():
            return
        if not vmm.waiting.complete():
            words = vmm.waiting.words
            _log.info("process %d: if the guest finds no clock, add to its command line: %s", vmm.pid, words)
        vmm.waiting = None

    def _begin_audit(self, vmm: Vmm) -> None:
        vmm.audit_begins()
        try:
            self._audit = Audit(vmm.pid), vmm
        except OSError as error:
            self._judge(answer_of(-1, f"no audit can begin: {error.strerror}", vmm.pid), vmm)

    def _judge(self, answer: Answer, vmm: Vmm) -> None:
        """Tell what an audit said, and act on it."""
        if not vmm.alive():
            return
        ends = self._policy.ends(answer.status, clock_alone=answer.clock_alone)
        if not ends:
            _log.info("process %d: %s", vmm.pid, answer.line)
            return
        _log.warning("process %d: %s; it is ended (%s=warn leaves it)", vmm.pid, answer.line, ends)
        vmm.kill()
