"""Errors and records between a VM's process and the program that started it."""

import errno

import msgspec
import pytest

from offmap.errors import BackendRefused, KernelError, OffmapError, Undetermined
from offmap.vmm.outcome import Outcome
from offmap.vmm.records import Failure, Output, Stopped, Typed, decode_from_vm, decode_to_vm, encode


@pytest.mark.parametrize(
    "error",
    [
        OffmapError("no", "do", why="so"),
        BackendRefused("no memory", "none is left", "ask for less"),
        Undetermined("who knows"),
        KernelError("KVM_RUN", errno.EFAULT, "look"),
    ],
)
def test_an_error_arrives_as_it_was(error: OffmapError) -> None:
    record = decode_from_vm(encode(Stopped(Outcome.FAILED, Failure.of(error))))
    assert isinstance(record, Stopped) and record.failure is not None
    arrived = record.failure.error()
    assert (type(arrived), str(arrived), arrived.remedy) == (type(error), str(error), error.remedy)
    if isinstance(error, KernelError):
        assert isinstance(arrived, KernelError) and arrived.errno == error.errno


def test_an_error_of_a_hostile_process_can_be_shown() -> None:
    hostile = Failure("SystemExit", "\x1b[2J" + "a" * 100_000, "\0", "\n")
    error = hostile.error()
    assert type(error) is OffmapError
    assert str(error).isprintable() and len(str(error)) < 10_000


def test_a_record_of_the_other_direction_is_none() -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_from_vm(encode(Typed(b"a")))
    with pytest.raises(msgspec.ValidationError):
        decode_to_vm(encode(Output(b"a")))
