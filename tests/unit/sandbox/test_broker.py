"""The broker takes descriptors before it is sealed only, and gives none but connections."""

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from offmap.sandbox import broker as module
from offmap.sandbox.broker import Broker, Services


@pytest.fixture
def broker() -> Iterator[Broker]:
    """Give one whose vsock ports all lead to a socket of its own."""
    services = Services(lambda _folder, _name: socket.socketpair()[0], lambda _pid: None, lambda _wait: None)
    with Broker(services) as broker:
        yield broker


def held(broker: Broker) -> set[str]:
    """What its descriptors are."""
    folder = Path(f"/proc/{broker.pid}/fd")
    return {str(each.readlink()) for each in folder.iterdir()}


def test_descriptors_go_to_it_before_it_is_sealed(broker: Broker, tmp_path: Path) -> None:
    (tmp_path / "sock").touch()
    folder = os.open(tmp_path, os.O_PATH)
    try:
        broker.keep_folder(folder, "sock")
        assert str(tmp_path) in held(broker)
    finally:
        os.close(folder)
    with broker.connect(0, 1000) as client:
        assert client.fileno() >= 0
    with pytest.raises(OSError) as refused:
        broker.connect(1, 1000)
    assert refused.value.errno == errno.EINVAL


def test_and_never_afterwards(broker: Broker, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.touch()
    with file.open() as opened:
        broker.seal()
        before = held(broker)
        for request in (module._KEEP_RANGE, module._KEEP_FOLDER, module._LOG, 0):
            broker._ask(request, 0, 0, 1 << 40, text="sock", fds=[opened.fileno()])
        assert held(broker) == before
        with pytest.raises(OSError):
            broker.connect(0, 1000)
