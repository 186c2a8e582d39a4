"""What tests on this machine's /dev/kvm share. It may be one that runs tiny guests only."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from offmap.errors import KernelError
from offmap.kvm import Kvm, Vm


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    """Give /dev/kvm."""
    try:
        handle = Kvm()
    except KernelError as error:
        pytest.skip(f"KVM's ABI was not tested against a real KVM: {error}")
    with handle:
        yield handle


@pytest.fixture
def vm(kvm: Kvm) -> Iterator[Vm]:
    """Give a VM without interrupt controllers."""
    with kvm.create_vm() as machine:
        machine.reserve_vmx_pages()
        yield machine


def descriptors() -> set[str]:
    """What this process has open."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.add(f"{entry.name} {os.readlink(entry)}")  # noqa: PTH115 - a text, and not always a path
        except FileNotFoundError:  # the folder itself
            continue
    return found
