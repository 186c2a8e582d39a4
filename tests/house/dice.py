"""A die: a virtio device made up for a test. Its configuration space says how many sides it has."""

from dataclasses import dataclass
from typing import ClassVar

from offmap.devices.virtio.device import Activation, Surroundings, VirtioDevice
from offmap.errors import OffmapError

__all__ = ["Dice", "DiceSpec", "parse_dice"]


@dataclass(frozen=True, slots=True)
class DiceSpec:
    """``--dice``."""

    sides: int

    def build(self, surroundings: Surroundings) -> "Dice":
        return Dice(self.sides)


class Dice(VirtioDevice):
    device_id: ClassVar[int] = 63  # nobody's (linux/virtio_ids.h)
    queue_sizes = (8,)

    def __init__(self, sides: int) -> None:
        self._sides = sides

    def config(self) -> bytes:
        return self._sides.to_bytes(4, "little")

    def activate(self, activation: Activation) -> None:
        """There is no driver for it."""

    def handle(self, queue: int) -> None:
        """Nor does anybody ask."""

    def reset(self) -> None:
        """It remembers nothing."""


def parse_dice(text: str) -> DiceSpec:
    """``sides=N``.

    Raises:
        OffmapError: that is none.
    """
    name, _, sides = text.partition("=")
    if name != "sides" or not sides.isdecimal():
        raise OffmapError(f"{text!r} is no die", "write sides=6")
    return DiceSpec(int(sides))
