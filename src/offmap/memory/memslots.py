"""Tell auditors where this guest's RAM is: a memfd named ``offmap-memslots``, held open for as long as the guest lives.

KVM does not show a VM's memory slots to anyone. Any VMM may adopt this convention (docs/memslots.md): auditors find
the memfd among the process's fds by its name, and check what it says against the process's mappings. It goes with the
process.
"""

import os
from collections.abc import Iterable

from offmap.memory.guest import GuestMemory
from offmap.memory.iomem import PhysicalRange

SCHEMA = "offmap-memslots/1"


def publish_memslots(memory: GuestMemory, backend: str, excluded: Iterable[PhysicalRange] = ()) -> int:
    """Create the memfd. Returns its fd, which the caller owns: closing it withdraws the statement."""
    slots = ", ".join(
        f'{{"guest_phys_addr": {region.guest_phys_addr}, "memory_size": {region.size}, '
        f'"userspace_addr": {region.userspace_addr}, "backend": "{backend}"}}'
        for region in memory.regions
    )
    # JSON by hand: importing `json` takes a thirtieth of a guest's start.
    statement = f'{{"schema": "{SCHEMA}", "slots": [{slots}], "excluded": {[[r.start, r.size] for r in excluded]}}}'
    fd = os.memfd_create("offmap-memslots", os.MFD_CLOEXEC)
    os.write(fd, statement.encode())
    return fd
