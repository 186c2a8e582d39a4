"""``--vsock``: a socket device as the user asks for it."""

from pathlib import Path
from typing import NamedTuple

from offmap.devices.virtio.device import Surroundings
from offmap.devices.virtio.vsock import Vsock
from offmap.devices.virtio.vsock_host import Listener, check_path
from offmap.errors import OffmapError
from offmap.uapi.virtio.vsock import VMADDR_CID_ANY, VMADDR_CID_HOST

__all__ = ["VsockSpec", "parse_vsock"]

_REMEDY = "write it like --vsock cid=3,path=/run/guest.sock"


class VsockSpec(NamedTuple):
    """``--vsock cid=N,path=PATH``.

    Attributes:
        cid: the guest's context id.
        path: of the Unix socket that the host's programs connect to.
    """

    cid: int
    path: Path

    def build(self, surroundings: Surroundings) -> Vsock:
        """Listen at the path."""
        return Vsock(self.cid, Listener(self.path), surroundings.say)


def parse_vsock(text: str) -> VsockSpec:
    """Both options must be there.

    Raises:
        OffmapError: what cannot be.
    """
    values: dict[str, str] = {}
    for word in text.split(","):
        key, equals, value = word.partition("=")
        if key not in {"cid", "path"} or not equals or not value or key in values:
            raise OffmapError(f"--vsock has no option {word!r}", _REMEDY)
        values[key] = value
    if "path" not in values:
        raise OffmapError(f"--vsock {text} does not say where the host's programs connect", _REMEDY)
    cid = values.get("cid", str(VMADDR_CID_HOST + 1))
    if not cid.isdecimal() or len(cid) > 10 or not VMADDR_CID_HOST < int(cid) < VMADDR_CID_ANY:
        raise OffmapError(f"a guest's context id cannot be {cid!r}", f"give a number from {VMADDR_CID_HOST + 1} up")
    path = Path(values["path"])
    check_path(path)
    return VsockSpec(int(cid), path)
