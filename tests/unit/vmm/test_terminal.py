"""The user's end of the console: escape key and raw mode."""

import itertools
import os
import pty
import termios
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offmap.vmm.terminal import EscapeKey, RawTerminal, Typed

KEYS = st.lists(st.sampled_from([b"\x01", b"a", b"x", b"h", b"?", b"q", b"\n", b"\x00", b"\xff"]), max_size=30).map(
    b"".join
)


def chunks(data: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(places)]


def run(pieces: list[bytes]) -> tuple[bytes, list[Typed]]:
    """All that passes up to a quit, and what was asked for."""
    escape, passed = EscapeKey(), b""
    asked: list[Typed] = []
    for piece in pieces:
        data, what = escape.filter(piece)
        passed += data
        if what is not Typed.NOTHING:
            asked.append(what)
        if what is Typed.QUIT:
            break
    return passed, asked


@given(st.binary().map(lambda data: data.replace(b"\x01", b"")))
def test_other_keys_pass_unchanged(data: bytes) -> None:
    assert EscapeKey().filter(data) == (data, Typed.NOTHING)


@given(st.binary())
def test_any_bytes_can_be_typed(data: bytes) -> None:
    assert EscapeKey().filter(data.replace(b"\x01", b"\x01a")) == (data, Typed.NOTHING)
    assert EscapeKey().filter(data.replace(b"\x01", b"\x01\x01")) == (data, Typed.NOTHING)


@given(KEYS, st.lists(st.integers(0, 100), max_size=8))
def test_chunks_make_no_difference(data: bytes, cuts: list[int]) -> None:
    whole, asked = run([data])
    passed, asked_in_chunks = run(chunks(data, cuts))
    assert passed == whole
    assert asked_in_chunks[-1:] == asked
    assert (Typed.QUIT in asked_in_chunks) == (asked == [Typed.QUIT])


@pytest.mark.parametrize(
    ("data", "passed", "asked"),
    [
        (b"ls\x01xrm -r", b"ls", Typed.QUIT),
        (b"\x01h", b"", Typed.HELP),
        (b"a\x01?b", b"ab", Typed.HELP),
        (b"\x01a", b"\x01", Typed.NOTHING),
        (b"\x01\x01x", b"\x01x", Typed.NOTHING),
        (b"\x01n", b"\x01n", Typed.NOTHING),
        (b"\x01", b"", Typed.NOTHING),
        (b"\x01h\x01x", b"", Typed.QUIT),
    ],
)
def test_escapes(data: bytes, passed: bytes, asked: Typed) -> None:
    assert EscapeKey().filter(data) == (passed, asked)


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Give both ends of a terminal."""
    master, slave = pty.openpty()
    yield master, slave
    os.close(master)
    os.close(slave)


def test_terminal_is_raw_inside_and_as_it_was_after(terminal: tuple[int, int]) -> None:
    master, slave = terminal
    odd = termios.tcgetattr(slave)
    odd[3] &= ~termios.ECHOE
    odd[6][termios.VINTR] = b"\x1f"
    termios.tcsetattr(slave, termios.TCSANOW, odd)
    before = termios.tcgetattr(slave)
    with RawTerminal(slave):
        inside = termios.tcgetattr(slave)
        assert not inside[3] & (termios.ECHO | termios.ICANON | termios.ISIG)
        assert inside[1] & termios.OPOST
        os.write(master, b"\x03\x1a\r\x01")
        assert os.read(slave, 10) == b"\x03\x1a\r\x01", "Ctrl-C, Ctrl-Z and Return are the guest's"
    assert termios.tcgetattr(slave) == before


def test_terminal_is_restored_after_an_error(terminal: tuple[int, int]) -> None:
    before = termios.tcgetattr(terminal[1])
    with pytest.raises(ZeroDivisionError), RawTerminal(terminal[1]):
        raise ZeroDivisionError
    assert termios.tcgetattr(terminal[1]) == before


def test_terminal_that_has_gone_is_no_error() -> None:
    master, slave = pty.openpty()
    with RawTerminal(slave):
        os.close(master)
    os.close(slave)


def test_what_is_no_terminal_is_left_alone() -> None:
    read, write = os.pipe()
    with RawTerminal(read):
        pass
    os.close(read)
    os.close(write)
