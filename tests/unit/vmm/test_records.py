"""Errors and records between a VM's process and the program that started it."""

import errno
import socket
import subprocess
from collections import deque

import msgspec
import pytest

from offmap.errors import BackendRefused, KernelError, OffmapError, Undetermined
from offmap.vmm.outcome import Outcome
from offmap.vmm.process import VmProcess
from offmap.vmm.records import Failure, FromVm, Output, Said, Stopped, Typed, decode_from_vm, decode_to_vm, encode


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


def test_what_a_vm_says_last_is_heard_though_its_process_has_ended() -> None:
    process, heard = VmProcess.__new__(VmProcess), list[FromVm]()
    process._heard = heard.append
    process._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    last = [Said("it is so"), Stopped(Outcome.FAILED, None)]
    with process._socket, theirs, subprocess.Popen(["true"], stderr=subprocess.PIPE) as ended:
        for each in last:
            theirs.send(encode(each))
        theirs.close()
        ended.wait()
        process._hear(ended, deque())
    assert heard == last
