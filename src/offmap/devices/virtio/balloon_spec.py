"""``--balloon``: a balloon as the user asks for it."""

from typing import NamedTuple

from offmap.devices.virtio.balloon import Balloon
from offmap.devices.virtio.device import Surroundings
from offmap.errors import OffmapError
from offmap.memory.backend import BACKENDS
from offmap.options import Options
from offmap.uapi.page import PAGE_SIZE
from offmap.units import format_size, parse_size


class BalloonSpec(NamedTuple):
    """``--balloon size=BYTES``.

    Attributes:
        size: what the guest is to give up from the start, in bytes.
    """

    size: int = 0

    def build(self, surroundings: Surroundings) -> Balloon:
        """Make the device, if this RAM can be given back at all."""
        memory = surroundings.memory
        if not surroundings.backend.discards:
            can = ", ".join(name for name, backend in BACKENDS.items() if backend.discards)
            raise OffmapError(
                "RAM of this kind cannot go back to the host page by page: a balloon would take it from the guest, and "
                "give it to nobody",
                f"leave --balloon out, or use a backend whose pages are the host's: {can}",
            )
        if self.size >= memory.size:
            raise OffmapError(
                f"a guest of {format_size(memory.size)} cannot give up {format_size(self.size)}", "ask for less"
            )
        if surroundings.hidden:
            # Kernel mappings of free pages (its image's freed parts) are looked for before the guest starts, only then.
            surroundings.say(
                "balloon: pages that the guest takes back leave the direct map like all of its RAM, but nobody looks "
                "for other mappings of them first; --audit=watch would show them"
            )
        return Balloon(memory, self.size // PAGE_SIZE, surroundings.say)


def parse_balloon(text: str) -> BalloonSpec:
    """``size=BYTES``: whole pages; 0 leaves it at what the guest reports by itself.

    Raises:
        OffmapError: what cannot be.
    """
    with Options(text, "--balloon", "write it like --balloon size=64M, or size=0; a multiple of 4K") as options:
        size = options.text("size", None, parse_size)
        if size is None:
            options.refuse("it does not say size=")
        if size % PAGE_SIZE:
            options.refuse(f"{format_size(size)} is not a whole number of pages")
    return BalloonSpec(size)
