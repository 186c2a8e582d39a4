"""The thread that a device lives on."""

import os
import select
import threading

import pytest

from offmap.devices.virtio.worker import Worker
from offmap.patience import scaled


def test_calls_run_on_the_thread_and_bring_back_what_happens() -> None:
    with Worker("test", lambda _: None) as worker:
        assert worker.call(lambda: threading.current_thread().name) == "test"
        assert worker.call(lambda: worker.call(lambda: 7)) == 7  # from the thread itself
        with pytest.raises(ZeroDivisionError):
            worker.call(lambda: 1 // 0)
        assert worker.call(lambda: 8) == 8


def test_events_of_files() -> None:
    seen: list[tuple[int, bytes]] = []
    first, second = os.pipe()
    with Worker("test", lambda _: None) as worker:
        worker.watch(first, lambda events: seen.append((events, os.read(first, 10))))
        os.write(second, b"one")
        worker.call(lambda: None)
        worker.unwatch(first)
        worker.unwatch(first)
        os.write(second, b"two")
        worker.call(lambda: None)
        worker.watch(first, lambda events: seen.append((events, os.read(first, 10))))
        worker.call(lambda: None)
        worker.call(lambda: None)
    assert seen == [(select.EPOLLIN, b"one"), (select.EPOLLIN, b"two")]
    os.close(first)
    os.close(second)


def test_one_that_stands_still_handles_nothing_until_it_goes_on() -> None:
    seen: list[bytes] = []
    first, second = os.pipe()
    with Worker("test", lambda _: None) as worker:
        worker.watch(first, lambda _: seen.append(os.read(first, 10)))
        for _ in range(3):
            worker.pause()
            os.write(second, b"kick")
            assert not select.select([], [], [], 0.01)[0]
            assert seen == []
            worker.resume()
            worker.call(lambda: None)
            worker.call(lambda: None)
            assert seen == [b"kick"]
            seen.clear()
        worker.pause()
        worker.resume()
    os.close(first)
    os.close(second)


def test_kicks_that_are_never_read_are_events_each() -> None:
    seen: list[int] = []
    kick = os.eventfd(0, os.EFD_NONBLOCK)
    with Worker("test", lambda _: None) as worker:
        worker.watch(kick, seen.append, select.EPOLLIN | select.EPOLLET)
        for count in range(1, 4):
            os.eventfd_write(kick, 1)
            worker.call(lambda: None)
            assert len(seen) == count
    os.close(kick)


def test_what_a_handler_raises_is_reported_and_the_thread_goes_on() -> None:
    def fail(_: int) -> None:
        raise ZeroDivisionError

    errors: list[Exception] = []
    kick = os.eventfd(0, os.EFD_NONBLOCK)
    with Worker("test", errors.append) as worker:
        worker.watch(kick, fail, select.EPOLLIN | select.EPOLLET)
        os.eventfd_write(kick, 1)
        assert worker.call(lambda: 9) == 9
        worker.post(lambda: fail(0))
        assert worker.call(lambda: 9) == 9
    assert [type(error) for error in errors] == [ZeroDivisionError, ZeroDivisionError]
    os.close(kick)


def test_whoever_reports_it_may_fail_too(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", told.append)

    def fail(error: Exception) -> None:
        raise BrokenPipeError from error

    def bug() -> None:
        raise ZeroDivisionError

    with Worker("test", fail) as worker:
        worker.post(bug)
        assert worker.call(lambda: 9) == 9
    assert [each.exc_type for each in told] == [BrokenPipeError]


def test_who_posts_himself_again_and_again_leaves_the_others_their_turn() -> None:
    kick, kicked = os.eventfd(0, os.EFD_NONBLOCK), threading.Event()
    with Worker("test", lambda _: None) as worker:

        def go_on() -> None:
            if not kicked.is_set():
                worker.post(go_on)

        worker.watch(kick, lambda _: kicked.set(), select.EPOLLIN | select.EPOLLET)
        worker.post(go_on)
        os.eventfd_write(kick, 1)
        came = kicked.wait(scaled(10))
        kicked.set()
    assert came
    os.close(kick)


def test_an_event_of_a_closed_file_is_not_taken_for_one_of_the_next_with_its_number() -> None:
    stale: list[int] = []
    first, second, quiet = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3))
    with Worker("test", lambda _: None) as worker:

        def replace(_: int) -> None:
            worker.unwatch(first)
            worker.unwatch(second)
            os.dup2(quiet, second)  # as close and open would
            worker.watch(second, stale.append)

        def both_at_once() -> None:
            worker.watch(first, replace)
            worker.watch(second, lambda _: None)
            os.eventfd_write(first, 1)
            os.eventfd_write(second, 1)

        worker.call(both_at_once)
        worker.call(lambda: None)
        worker.call(lambda: None)
    assert not stale
    for fd in (first, second, quiet):
        os.close(fd)


def test_closing_ends_the_thread_after_what_was_posted() -> None:
    done: list[int] = []
    worker = Worker("to be closed", lambda _: None)
    for number in range(3):
        worker.post(lambda number=number: done.append(number))  # type: ignore[misc]
    worker.close()
    worker.close()
    assert done == [0, 1, 2]
    assert "to be closed" not in {thread.name for thread in threading.enumerate()}
