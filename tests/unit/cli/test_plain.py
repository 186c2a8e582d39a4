"""Command lines that are read without argparse: what comes out is what argparse makes of them."""

import argparse
from collections.abc import Sequence
from types import ModuleType
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offmap.cli import run, wrap
from offmap.cli.log import add_log_options
from offmap.cli.parsers import parse
from offmap.cli.plain import PlainParser, WrongUse

RUN = "--kernel --initrd --cmdline --console --image --exec --memory --memory-size --vcpus --kvm-clock --audit --stats"
WORDS = [
    *RUN.split(),
    *("--no-sandbox", "--report", "--drive", "--net", "--vsock", "--balloon", "--rng", "--virtio-mmio-cmdline"),
    *("--kern", "--vcpus=2", "--vcpus=", "--audit=watch", "--stats=1", "--rng=rate=1M", "-v", "--log-format", "--"),
    *["k", "2", "-1", "-", "two", "on", "watch", "once", "virtio", "a=b", "disk,readonly=on"],
    *("", "console=ttyS0 quiet"),
]


def plain(command: ModuleType, words: Sequence[str]) -> dict[str, object] | None:
    parser = PlainParser()
    command.add_parser(parser)
    found = parser.parse(words)
    return None if found is None else vars(found)


def argparses(command: str, words: Sequence[str]) -> dict[str, object]:
    return vars(parse(command, [command, *words]))


@pytest.mark.parametrize(
    "line",
    [
        "--kernel k",
        "--kernel k --initrd=i --memory unplugged --memory-size 1G --vcpus 4 --kvm-clock off --stats",
        "--kernel k --audit --report r",
        "--kernel k --audit watch --no-sandbox",
        "--drive a --rng --net tap=t --rng rate=1M --drive b,readonly=on --virtio-mmio-cmdline",
        "--image debian,rw=on --console virtio --kernel one --kernel two",
    ],
)
def test_options_in_full_need_no_argparse(line: str) -> None:
    assert plain(run, line.split()) == argparses("run", line.split())


@pytest.mark.parametrize(
    "words",
    [
        *(["k"], ["--kern", "k"], ["-v"], ["--help"], ["--log-format", "json"], ["--fly"], ["--"], ["--kernel"]),
        *(["--kernel", ""], ["--kernel="], ["--kernel", "-k"], ["--vcpus", "two"], ["--kvm-clock", "maybe"]),
        *(["--stats=yes"], ["--audit", "never"], ["--cmdline", "-v"]),
    ],
)
def test_anything_else_is_left_to_argparse(words: list[str]) -> None:
    assert plain(run, words) is None


@given(st.lists(st.sampled_from(WORDS), max_size=6))
def test_no_line_means_something_else_to_argparse(words: list[str]) -> None:
    found = plain(run, words)
    if found is not None:
        assert found == argparses("run", words)


def test_what_argparse_refuses_is_told_by_argparse() -> None:
    with pytest.raises(WrongUse, match="argument --kernel: is an empty name"):
        parse("run", ["run", "--kernel", ""])


@given(
    st.lists(
        st.sampled_from(["--memory", "pool", "--on-exposed=warn", "--on-undetermined", "kill", "--trust-shared", "-v"]),
        max_size=5,
    )
)
def test_a_wrapped_vmm_is_wrapped_as_argparse_would_have_it(words: list[str]) -> None:
    found = plain(wrap, words)
    if found is None:
        return
    with patch.object(argparse.ArgumentParser, "exit", side_effect=AssertionError):
        expected = argparses("wrap", [*words, "--", "vmm"])
    assert expected.pop("command") in (["--", "vmm"], ["vmm"])
    assert found == expected


def test_every_option_of_a_plain_command_is_one_that_the_plain_parser_knows() -> None:
    parser = argparse.ArgumentParser()
    run.add_parser(parser.add_subparsers())
    add_log_options(parser)
    options = PlainParser()
    run.add_parser(options)  # type: ignore[arg-type]  # in the place of subparsers
    real = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices["run"]
    logged = {"-h", "--help", "-v", "--verbose", "--log-format"}
    assert {o for action in real._actions for o in action.option_strings} - logged == set(options._options)
