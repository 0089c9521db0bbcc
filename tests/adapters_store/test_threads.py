"""Work that threads do, and work for which the system has none."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from adapters_store.registry import RegistryUnavailable
from adapters_store.threads import NoThread, Threads
from adapters_store.workers import Workers
from tests.panic import Panic


@contextmanager
def none_left() -> Iterator[None]:
    """The system starts no thread: each is to have a stack with more bytes than there are addresses."""
    usual = threading.stack_size(1 << 50)
    try:
        yield
    finally:
        threading.stack_size(usual)


def test_what_is_refused_is_not_done_later() -> None:
    done: list[int] = []
    with Threads(2, "t") as threads:
        with none_left():
            for number in range(3):
                with pytest.raises(NoThread, match="can't start new thread"):
                    threads.submit(done.append, number)
        threads.submit(done.append, 7).result(60)
    assert done == [7]


def test_what_a_thread_is_there_for_is_done() -> None:
    done: list[int] = []
    with Threads(1, "t") as threads:
        threads.submit(done.append, 1).result(60)
        with none_left():
            threads.submit(done.append, 2).result(60)
    assert done == [1, 2]


@pytest.mark.parametrize("error", [ValueError("no"), Panic("at 3")])
def test_what_is_raised_is_told(error: BaseException) -> None:
    def fail(*, by: BaseException) -> None:
        raise by

    with Threads(1, "t") as threads:
        assert threads.submit(fail, by=error).exception(60) is error
        assert threads.submit(max, 3, 4).result(60) == 4


def test_what_is_given_up_is_not_done() -> None:
    gate, began, done = threading.Event(), threading.Event(), []

    def wait() -> None:
        began.set()
        gate.wait()

    threads = Threads(1, "t")
    first = threads.submit(wait)
    assert began.wait(60)
    given_up, cancelled = threads.submit(done.append, 1), threads.submit(done.append, 2)
    assert given_up.cancel()
    assert not first.cancel()
    threads.shutdown(wait=False, cancel_futures=True)
    assert cancelled.cancelled()
    gate.set()
    first.result(60)
    threads.shutdown()
    assert not done
    with pytest.raises(NoThread, match="after shutdown"):
        threads.submit(done.append, 3)


async def test_a_registry_that_no_thread_can_ask_is_unavailable() -> None:
    workers = Workers()
    with none_left(), pytest.raises(RegistryUnavailable, match="can't start new thread"):
        await workers.query(max, 1, 2)
    assert await workers.query(max, 1, 2) == 2
    await workers.close()
