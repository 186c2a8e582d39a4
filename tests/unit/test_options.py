"""The one parser of options with options, and errors whose parts stay apart."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offmap.errors import BackendRefused, KernelError, OffmapError
from offmap.options import Options


def parse(text: str) -> tuple[object, ...]:
    with Options(text, "--thing", "write it so", leads=True, flags=("bare",)) as options:
        return (
            options.lead,
            options.text("name", "", str),
            options.switch("on"),
            options.number("count", None, 2, 63),
            options.every("more"),
            options.flag("bare"),
        )


def test_each_word_is_taken_by_who_knows_it() -> None:
    assert parse("/a") == ("/a", "", False, None, [], False)
    assert parse("") == ("", "", False, None, [], False)
    assert parse("/a,more=1,name=n=1,on=on,count=63,more=2") == ("/a", "n=1", True, 63, ["1", "2"], False)
    assert parse(",bare,on=off") == ("", "", False, None, [], True)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("/a,", "there is no option ''"),
        ("/a,name", "there is no option 'name'"),
        ("/a,name=", "there is no option 'name='"),
        ("/a,=x", "there is no option '=x'"),
        ("/a,other=x", "there is no option 'other=x'"),
        ("/a,name=x,bare", "there is no option 'bare'"),
        ("/a,name=x,name=x", "name is there twice"),
        ("/a,on=yes", "on is on or off, not 'yes'"),
        ("/a,count=1", "count is a number from 2 to 63, not '1'"),
        ("/a,count=64", "count is a number from 2 to 63, not '64'"),
        ("/a,count=-3", "count is a number from 2 to 63, not '-3'"),
        ("/a,count=²", "count is a number from 2 to 63, not '²'"),
        ("/a,count=" + "9" * 5000, "count is a number"),
    ],
)
def test_what_is_refused_carries_what_why_and_remedy(text: str, why: str) -> None:
    with pytest.raises(OffmapError) as caught:
        parse(text)
    error = caught.value
    assert error.what == f"--thing cannot be {text!r}"
    assert error.why.startswith(why)
    assert error.remedy == "write it so"
    assert str(error) == f"{error.what}: {error.why}; {error.remedy}"


@given(st.text())
def test_any_text_is_taken_or_refused_in_one_line(text: str) -> None:
    try:
        parse(text)
    except OffmapError as error:
        assert len(str(error).splitlines()) == 1


def test_a_refusal_from_another_process_is_the_same_line() -> None:
    for line in ("a: b; c", "a", "a; c", "a: b", "a: b: d; c; e", "open of /dev/mem failed: No (EPERM); run as root"):
        assert str(BackendRefused.from_line(line)) == line
    refused = BackendRefused.from_line("no memory: none is free; ask for less")
    assert (refused.what, refused.why, refused.remedy) == ("no memory", "none is free", "ask for less")


def test_a_system_calls_failure_says_why_apart() -> None:
    error = KernelError("open of /dev/mem", 13, "run as root")
    assert (error.what, error.why) == ("open of /dev/mem failed", "Permission denied (EACCES)")
    assert error.reason == "open of /dev/mem failed: Permission denied (EACCES)"
    assert str(error) == f"{error.reason}; run as root"
