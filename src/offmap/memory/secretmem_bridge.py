"""memfd_secret memory on a stock kernel: the guest runs from the offmap module's view of the same pages.

GUP refuses secret memory, so KVM cannot run from it (secretmem.py). The module holds the pages and maps them as
VM_PFNMAP, which KVM takes without GUP (kernel/module/bridge.c). Pages that keep a mapping in the kernel's image are
found by the audit, and kept from the guest.
"""

import errno
import os

from offmap.errors import BackendRefused, KernelError
from offmap.kvm import Vm
from offmap.memory.backend import ASK_FOR_LESS, Backend, check_host_has
from offmap.memory.backing import Backing
from offmap.memory.module_device import open_module
from offmap.memory.populate import populate
from offmap.memory.secretmem import map_secret, secret_file
from offmap.uapi import offmap_module as uapi


class SecretmemBridge(Backend):
    name = "secretmem-bridge"
    hides = True
    needs_module = True
    page_by_page = True

    def allocate(self, vm: Vm, size: int) -> list[Backing]:
        check_host_has(size)
        with open_module() as device:
            fd = secret_file(size)
            try:
                with map_secret(fd, size) as secret:
                    populate(secret, progress=self.progress)
                request = uapi.offmap_secretmem(fd, 0, 0)
                device.call("OFFMAP_BIND_SECRETMEM", uapi.OFFMAP_BIND_SECRETMEM, request)
            except KernelError as error:
                remedy = ASK_FOR_LESS
                if error.errno != errno.EFAULT:
                    remedy = "see the kernel's log, or use another backend"
                raise BackendRefused(error.what, error.why, remedy) from None
            finally:
                os.close(fd)
            # The mapping holds the device's file, and that the secret one: the pages go back with the mapping.
            return [Backing(uapi.DEVICE, device.fd, size)]
