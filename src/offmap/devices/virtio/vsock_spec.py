"""``--vsock``: a socket device as the user asks for it."""

from pathlib import Path

from offmap.devices.virtio.device import Surroundings
from offmap.devices.virtio.limit import Limit
from offmap.devices.virtio.vsock import Vsock
from offmap.devices.virtio.vsock_host import Listener, check_path
from offmap.options import Options
from offmap.typed import NamedTuple
from offmap.uapi.virtio.vsock import VMADDR_CID_ANY, VMADDR_CID_HOST

_REMEDY = "write it like --vsock cid=3,path=/run/guest.sock"


class VsockSpec(NamedTuple):
    """``--vsock cid=N,path=PATH``.

    Attributes:
        cid: the guest's context id.
        path: of the Unix socket that the host's programs connect to.
        limit: how much may go each way in a second.
    """

    cid: int
    path: Path
    limit: Limit | None = None

    def build(self, surroundings: Surroundings) -> Vsock:
        """Listen at the path."""
        vsock = Vsock(self.cid, Listener(self.path), surroundings.say)
        vsock.limit = self.limit
        return vsock


def parse_vsock(text: str) -> VsockSpec:
    """Both options must be there. Raises OffmapError: what cannot be."""
    with Options(text, "--vsock", _REMEDY) as options:
        path = options.text("path", None, Path)
        if path is None:
            options.refuse("it does not say where the host's programs connect")
        cid = options.number("cid", VMADDR_CID_HOST + 1, VMADDR_CID_HOST + 1, VMADDR_CID_ANY - 1)
        limit = Limit.from_options(options)
    check_path(path)
    return VsockSpec(cid, path, limit)
