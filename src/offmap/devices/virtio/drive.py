"""``--drive PATH[,option=value…]``: what the user asks for of a virtio-blk device."""

from pathlib import Path

from offmap.devices.virtio.device import Surroundings
from offmap.devices.virtio.limit import Limit
from offmap.errors import OffmapError
from offmap.options import Options
from offmap.typed import TYPE_CHECKING, NamedTuple
from offmap.uapi.virtio.blk import VIRTIO_BLK_ID_BYTES

if TYPE_CHECKING:
    from offmap.devices.virtio.blk import Blk

_USAGE = (
    "write PATH, then options of readonly=on|off, serial=TEXT, direct=on|off, bounce=on|off, rate=BYTES, ops=N "
    "(both a second)"
)


class DriveSpec(NamedTuple):
    """A drive.

    Attributes:
        path: a raw image or a block device.
        readonly: the guest cannot write to it, and others may use it at the same time.
        serial: what the guest finds as its serial number, at most 20 bytes.
        direct: past the host's page cache, so that no copy of the guest's data stays in it.
        bounce: through a buffer of this process, which direct I/O needs on hidden RAM.
        limit: how much the guest may read and write in a second.
    """

    path: Path
    readonly: bool = False
    serial: str = ""
    direct: bool = False
    bounce: bool = False
    limit: Limit | None = None

    def build(self, surroundings: Surroundings) -> "Blk":
        """Open and lock the file. Raises OffmapError: it cannot be used, or not so."""
        from offmap.devices.virtio.blk import Blk
        from offmap.devices.virtio.disk import Disk

        if self.direct and surroundings.hidden and not self.bounce:
            raise OffmapError(
                f"the drive {self.path} cannot have direct=on: the kernel would have to pin the guest's pages (GUP), "
                "and hidden RAM cannot be",
                "add bounce=on: one buffer of offmap's own, which the host kernel maps, instead of its page cache",
            )
        disk = Disk(self.path, readonly=self.readonly, direct=self.direct, bounce=self.bounce, say=surroundings.say)
        blk = Blk(disk, readonly=self.readonly, serial=self.serial, say=surroundings.say)
        blk.limit = self.limit
        return blk


def parse_drive(text: str) -> DriveSpec:
    """The drive that `text` asks for. Raises OffmapError: no path, or an option that there is not."""
    with Options(text, "--drive", _USAGE, leads=True) as options:
        if not options.lead:
            options.refuse("it names no file")
        return DriveSpec(
            Path(options.lead),
            readonly=options.switch("readonly"),
            serial=options.text("serial", "", _serial),
            direct=options.switch("direct"),
            bounce=options.switch("bounce"),
            limit=Limit.from_options(options),
        )


def _serial(text: str) -> str:
    if len(text) > VIRTIO_BLK_ID_BYTES or not text.isascii() or not text.isprintable():
        raise OffmapError(
            f"{text!r} cannot be a drive's serial number",
            f"give up to {VIRTIO_BLK_ID_BYTES} printable ASCII characters",
        )
    return text
