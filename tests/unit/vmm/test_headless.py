"""What is told of a guest whose console nobody sees."""

from typing import cast

import pytest

from offmap.vmm.config import MachineConfig
from offmap.vmm.headless import Headless


@pytest.mark.parametrize(
    ("console", "told"),
    [
        ([], ""),
        ([b"one\r\n", b"two\r\n\r\n"], "two"),
        ([b"Kernel panic - ", b"not syncing\r\nRebooting"], "Kernel panic - not syncing"),
        (
            [
                b"[ 5.1] BUG: unable to handle page fault\n[ 5.1] #PF: error\n[ 5.1] Oops: Oops: 0002\n",
                b"[ 5.1] RIP: 0010:vring_interrupt+0x1\n[ 5.2] RIP: 0010:default_idle+0xf\n[ 5.2] Kernel panic: x\n",
            ],
            "[ 5.1] BUG: unable to handle page fault; [ 5.1] RIP: 0010:vring_interrupt+0x1; [ 5.2] Kernel panic: x",
        ),
        (
            [b"[ 1.0] WARNING: CPU: 0\n[ 1.0] RIP: 0010:foo_probe+0x1\n[ 3.0] Kernel panic - not syncing: VFS: x\n"],
            "[ 3.0] Kernel panic - not syncing: VFS: x",
        ),
        (
            [
                b"[ 1.0] BUG: soft lockup\n[ 1.0] RIP: 0010:slow+0x1\n" + b"[ 2.0] fine\n" * 9,
                b"[ 5.1] Oops: general protection fault\n[ 5.1] RIP: 0010:bad+0x1\n[ 5.2] Kernel panic: x\n",
            ],
            "[ 5.1] Oops: general protection fault; [ 5.1] RIP: 0010:bad+0x1; [ 5.2] Kernel panic: x",
        ),
        ([b"offmap-guest: no root device /dev/vda\nreboot: Power down\n"], "offmap-guest: no root device /dev/vda"),
        ([b"\x1b]0;title\x07\x1b[2Jgone\xff\n"], "?]0;title??[2Jgone\N{REPLACEMENT CHARACTER}"),
        ([b"x" * 1_000_000], "x" * 300),
    ],
)
def test_its_last_words_are_one_line_of_printable_characters(console: list[bytes], told: str) -> None:
    headless = Headless(cast(MachineConfig, None), -1, say=lambda _: None)
    headless._console.extend(console)
    words = headless.last_words
    assert words == told
