"""The frame protocol, whatever the pieces it arrives in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offmap.lab.guest.frames import Decoder, Start, decode_start, encode_start, frame, i32, to_i32

FRAMES = st.lists(st.tuples(st.integers(0, 255), st.integers(0, 2**32 - 1), st.binary(max_size=200)), max_size=20)


@given(FRAMES, st.integers(1, 64))
def test_frames_survive_any_cutting(frames: list[tuple[int, int, bytes]], size: int) -> None:
    stream = b"".join(frame(*item) for item in frames)
    decoder = Decoder()
    got = [item for at in range(0, len(stream), size) for item in decoder.feed(stream[at : at + size])]
    assert got == frames


@given(st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_integers(values: list[int]) -> None:
    assert to_i32(i32(*values)) == values


TEXT = st.binary(max_size=30).filter(lambda text: b"\0" not in text)


@given(
    st.lists(TEXT, min_size=1), st.lists(TEXT), TEXT, st.none() | st.tuples(st.integers(1, 500), st.integers(1, 500))
)
def test_start(argv: list[bytes], env: list[bytes], cwd: bytes, terminal: tuple[int, int] | None) -> None:
    start = decode_start(encode_start(Start(argv, env, cwd, terminal)))
    assert (start.argv, start.env, start.cwd, start.terminal) == (argv, env, cwd, terminal)


def test_start_refuses_nul() -> None:
    with pytest.raises(ValueError, match="null"):
        encode_start(Start([b"a\0b"], [], b"/"))
