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
