"""``struct list_head`` of the running kernel, as KVM uses it."""

import struct
from collections.abc import Iterator

from offmap.audit.btf import Unknown
from offmap.audit.xarray import Read


def links(read: Read, head: int, most: int) -> Iterator[int]:
    """The members of a list, but the one at `head`.

    KVM adds at the front, so that what stays on the list stays behind what it was behind: if each member is found right
    behind the one before it, none was passed over.

    Args:
        head: address of the ``struct list_head`` to begin at. It may be a member's: then the list's own head comes too.
        most: how many members the list may have.

    Raises:
        Unknown: it is being changed, or does not end.
    """
    before, at = head, int.from_bytes(read(head, 8), "little")
    for _ in range(most):
        following, previous = struct.unpack("<QQ", read(at, 16))
        if previous != before:
            raise Unknown("a list of KVM's is being changed")
        if at == head:
            return
        yield at
        before, at = at, following
    raise Unknown("a list of KVM's does not end")
