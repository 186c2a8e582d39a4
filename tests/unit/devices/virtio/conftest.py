"""Fixtures that several tests of virtio devices share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .vsock_guest import Guest


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    """A guest with a vsock device, whose driver the test plays."""
    guest = Guest(tmp_path)
    with guest.bench:
        yield guest
