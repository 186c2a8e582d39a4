"""How often the memory under each VM's slots was exchanged, as an audit saw it, for the next one.

KVM counts how often memory under a VM's slots was unmapped or moved, but it does not say when. So a VMM that sees an
audit come may have put hidden memory there just before. It has not, if the count is 0, or if it is what an audit saw
that was there before this one.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from offmap.audit.kvm_list import Vm
from offmap.errors import OffmapError
from offmap.report.files import PRIVATE, check_replaceable, replace_file
from offmap.report.typed import Address, Count, Document, Malformed, decode, parse_json

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_LIMIT = 64 << 20  # 65,536 VMs


class SeenVm(Document, frozen=True):
    """A VM as an audit saw it.

    Attributes:
        address, memory, label: its identity, as ``kvm_list.Vm`` has it.
        began: when that audit began (CLOCK_MONOTONIC, nanoseconds).
        invalidations: how often memory under its slots had been unmapped or moved.
    """

    address: Address
    memory: Address
    label: str
    began: Count
    invalidations: Count

    def is_still(self, vm: Vm) -> bool:
        """Whether it is this VM, and no memory under its slots was unmapped or moved since."""
        same = (self.address, self.memory, self.label, self.invalidations) == (*vm.identity, vm.invalidations)
        return same and not vm.made_since(self.began)


class _Kept(Document, frozen=True, tag_field="schema", tag="offmap-seen/1"):
    """What the file has."""

    boot_id: str
    vms: tuple[SeenVm, ...]


def seen_at(began: int, vms: Iterable[Vm]) -> tuple[SeenVm, ...]:
    """What an audit that began then saw of these VMs; of one that it read twice, the last."""
    found = {vm.identity: vm for vm in vms}
    return tuple(
        SeenVm(Address(vm.address), Address(vm.memory), vm.label, began, vm.invalidations) for vm in found.values()
    )


def exchanged(vms: Iterable[Vm], seen: Sequence[SeenVm]) -> bool:
    """Whether memory under a slot of one of them may have been exchanged since an earlier audit saw them.

    Args:
        seen: what that saw; without it, since they were made.
    """
    return any(vm.invalidations and not any(each.is_still(vm) for each in seen) for vm in vms)


class Seen:
    """What the last audit saw, kept in a file or in memory only.

    Args:
        path: of the file. It is read when it is first asked for, and holds what one audit saw, no more.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._vms: tuple[SeenVm, ...] | None = None

    @property
    def vms(self) -> tuple[SeenVm, ...]:
        """What it saw; nothing if there was none in this boot.

        Raises:
            OffmapError: the file is no such file, or cannot be replaced.
        """
        if self._vms is None:
            self._vms = () if self._path is None else _read(self._path)
        return self._vms

    def keep(self, vms: Iterable[SeenVm]) -> None:
        """Replace it; raises as ``replace_file``. It holds kernel addresses: only the file's owner may read it."""
        self._vms = tuple(vms)
        if self._path is not None:
            replace_file(self._path, json.dumps(_Kept(_boot_id(), self._vms).to_json()), PRIVATE)


def _read(path: Path) -> tuple[SeenVm, ...]:
    check_replaceable(path)
    try:
        with path.open("rb") as file:
            kept = decode(_Kept, parse_json(file.read(_LIMIT)))
    except FileNotFoundError:
        return ()
    except (OSError, Malformed) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise OffmapError(f"{path} is not what an audit kept: {why}", "name another file, or remove it") from None
    return kept.vms if kept.boot_id == _boot_id() else ()


def _boot_id() -> str:
    return _BOOT_ID.read_text(encoding="ascii").strip()
