"""KVM's list and the kernel's tasks, read once for many processes.

With 50 VMs, reading the whole list for each would take longer than all walks. What is taken from here is checked with a
few reads when it is used: the task still has that address space, and the VM's slots are still the same. Where they are
not, the list is read anew for that process alone.
"""

from collections.abc import Mapping, Sequence

from offmap.audit.btf import Unknown
from offmap.audit.guest_ram import OthersVm, ask_kvm_list, vm_links
from offmap.audit.kvm_list import KvmList, Vm
from offmap.audit.process import Process


class Moment:
    """What the list said when this was made.

    Raises:
        Unknown: the list, or a VM that stays on it, cannot be read.
    """

    def __init__(self, kvm: KvmList) -> None:
        self._kvm = kvm
        # Tasks last: an address space that has a VM has a task before it has the VM.
        self.vms = kvm.vms()
        self.threads = {thread.tid: thread for thread in kvm.threads()}
        self._addresses = {vm.address for vm in self.vms}

    def ask(self, process: Process, links: Mapping[int, str]) -> Sequence[Vm]:
        """The VMs that a process made; says and raises what ``ask_kvm_list`` does."""
        thread = self.threads.get(process.pid)
        if thread is not None and self._kvm.is_there(thread):
            vms = [vm for vm in self.vms if vm.memory == thread.memory]
            if vms and not any(map(self._kvm.changed, vms)) and self._has(process.pid, thread.task, links):
                return vms
        return ask_kvm_list(self._kvm, process, links)

    def _has(self, tid: int, task: int, links: Mapping[int, str]) -> bool:
        """Whether all VMs that these descriptors keep were on the list."""
        try:
            return self._kvm.held(tid, vm_links(links), task) <= self._addresses
        except Unknown:  # one was closed meanwhile
            return False


def unlisted(moment: Moment, process: Process) -> str:
    """Why KVM's list does not have all that the process holds; empty if it has.

    Raises:
        Undetermined: its descriptors cannot be read, or it has ended.
    """
    links = process.descriptors()
    if vm_links(links):
        try:
            moment.ask(process, links)
        except OthersVm:
            pass
        except Unknown as error:
            process.check_alive()
            return str(error)
    return ""
