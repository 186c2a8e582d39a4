"""When a VM was made, and when its slots were last changed, as KVM's own structures have it."""

import time

from offmap.audit.btf import Unknown
from offmap.audit.tasks import Tasks

_SECOND = 1_000_000_000
_TICK = 10_000_000  # nanoseconds between two ticks of the kernel's clock, at most (CONFIG_HZ_100)


class KvmTimes(Tasks):
    """Reads these times by the address of a VM's ``struct kvm``; CLOCK_MONOTONIC, in nanoseconds."""

    def _last_change(self, address: int) -> int:
        """When the SRCU that KVM waits for at each change of the slots last had a grace period."""
        return self._last_grace_period(address + self._btf.offset("kvm", "srcu"))

    def _last_grace_period(self, srcu: int) -> int:
        """When a ``struct srcu_struct`` last had one."""
        try:
            return self._field(srcu, "srcu_struct", "srcu_last_gp_end")
        except Unknown:  # since 6.4 in a structure of its own
            return self._field(self._field(srcu, "srcu_struct", "srcu_sup"), "srcu_usage", "srcu_last_gp_end")

    def _made(self, address: int) -> int | None:
        """When its folder in debugfs was made, at the latest, which nobody but root can change; None if it has none.

        The VMM sees to it that it has none if it makes two VMs with the same descriptor number, one after the other.
        """
        try:
            made = self._changed_at(self._folder(address))
        except Unknown:
            return None
        ago = time.time_ns() - made
        # An inode has the time of the last tick (ktime_get_coarse_real_ts64). Or the clock was put back since.
        return time.monotonic_ns() - ago + _TICK if ago >= 0 else None

    def _changed_at(self, inode: int) -> int:
        """``ctime`` of an inode (CLOCK_REALTIME, nanoseconds): of a folder in debugfs, when it was made."""
        # Linux from 6.11 on, from 6.6 on, and before.
        for members in (("i_ctime_sec",), ("__i_ctime", "tv_sec"), ("i_ctime", "tv_sec")):
            try:
                seconds = self._field(inode, "inode", *members)
                rest = ("i_ctime_nsec",) if len(members) == 1 else (members[0], "tv_nsec")
                return seconds * _SECOND + self._field(inode, "inode", *rest, size=4)
            except Unknown:
                continue
        raise Unknown("struct inode is not as expected")

    def _folder(self, address: int) -> int:
        """The inode of its folder in debugfs. Raises Unknown: it has none; an error number stands in its place."""
        entry = self._field(address, "kvm", "debugfs_dentry")
        if not entry:
            raise Unknown("it has no folder in debugfs")
        return self._field(entry, "dentry", "d_inode")
