"""What a machine is made of, and the checks that need not build it."""

from collections.abc import Sequence

from offmap.boot.linux import BootSource
from offmap.errors import OffmapError
from offmap.hide import NotAudited, Vet, check_vetting
from offmap.memory.backend import Backend
from offmap.typed import TYPE_CHECKING, Final
from offmap.uapi.page import PAGE_SIZE
from offmap.units import format_size
from offmap.vmm.pvclock import is_safe_on_hidden_memory

if TYPE_CHECKING:
    from offmap.devices.virtio.device import DeviceSpec

MAX_VCPUS = 16
MAX_MEMORY = 1 << 40  # the E820 map and the boot page tables are tested for so much


class MachineConfig:
    """What one guest is made of. To compose it in steps, begin with a small one and `replace`: each step is checked.

    Attributes:
        source: kernel, initrd, command line.
        backend: where its RAM comes from.
        memory_size: bytes of RAM, whole pages.
        vcpus: 1 to MAX_VCPUS.
        kvm_clock: offer the pvclock; None: unless the RAM is hidden.
        count_exits: keep statistics of VM exits.
        devices: its virtio devices, in the order in which the guest finds them, each with a name for people.
        virtio_mmio_cmdline: announce them on the kernel's command line too, for a kernel that does not look for them
            in ACPI (one that does then says, once a device, that it has found it before).
        vetting: what to do about RAM that promises to be hidden: have it audited, or say why not. There is no
            default, so that nobody forgets it.

    Raises:
        OffmapError: a value that no host could satisfy.
        TypeError: `vetting` is neither of the two.
    """

    def __init__(
        self,
        source: BootSource,
        backend: Backend,
        memory_size: int,
        vcpus: int = 1,
        *,
        vetting: Vet | NotAudited,
        kvm_clock: bool | None = None,
        count_exits: bool = False,
        devices: "Sequence[tuple[str, DeviceSpec]]" = (),
        virtio_mmio_cmdline: bool = False,
    ) -> None:
        self.source: Final = source
        self.backend: Final = backend
        self.memory_size: Final = memory_size
        self.vcpus: Final = vcpus
        self.vetting: Final = vetting
        self.kvm_clock: Final = kvm_clock
        self.count_exits: Final = count_exits
        self.devices: Final = devices
        self.virtio_mmio_cmdline: Final = virtio_mmio_cmdline
        check_vetting(vetting)
        if not 0 < self.memory_size <= MAX_MEMORY or self.memory_size % PAGE_SIZE:
            raise OffmapError(
                f"a guest cannot have {format_size(self.memory_size)} of RAM",
                f"give --memory-size a whole number of pages up to {format_size(MAX_MEMORY)}, like 256M",
            )
        if not 1 <= self.vcpus <= MAX_VCPUS:
            raise OffmapError(f"a guest cannot have {self.vcpus} vCPUs", f"ask for 1 to {MAX_VCPUS}")
        if self.kvm_clock and self.backend.hides and not is_safe_on_hidden_memory():
            raise OffmapError(
                f"kvm-clock cannot be offered on {self.backend.name} memory: this host's kernel must map its page",
                "leave --kvm-clock out, or use a kernel that updates it by userspace address (patched:7.3 of the lab)",
            )

    def replace(self, **changes: object) -> "MachineConfig":
        """A copy with these values changed, by their names. Raises OffmapError: a value that no host could satisfy."""
        return MachineConfig(**vars(self) | changes)

    @property
    def offers_kvm_clock(self) -> bool:
        """Whether the guest gets kvm-clock."""
        return not self.backend.hides if self.kvm_clock is None else self.kvm_clock
