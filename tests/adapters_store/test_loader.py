"""Threads that load: results come when they are asked for, in order, and the threads go when there is nothing to do."""

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import pytest

from adapters_store import loader as module
from adapters_store.loader import ThreadLoader
from adapters_store.threads import NoThread
from tests.panic import Panic

NO_MACHINE_HAS = 1 << 50
"""Bytes of a stack, more than there are addresses: the system starts no thread with it."""


@pytest.fixture
def make() -> Iterator[Callable[..., ThreadLoader]]:
    made: list[ThreadLoader] = []

    def loader(*arguments: object) -> ThreadLoader:
        made.append(ThreadLoader(*arguments))  # type: ignore[arg-type]
        return made[-1]

    yield loader
    for each in made:
        each.close(60.0)


def finish(loader: ThreadLoader) -> None:
    while loader.pending:
        loader.wait(60.0)
        loader.poll()


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "adapter-loader"]


def test_work_runs_elsewhere_and_is_reported_here(make: Callable[..., ThreadLoader]) -> None:
    loader = make(2)
    here, ran, told = threading.get_ident(), [], []

    def work() -> int:
        ran.append(threading.get_ident())
        return 7

    def done(result: int | Exception) -> None:
        told.append((result, threading.get_ident()))

    loader.submit(work, done)
    loader.wait(60.0)
    assert not told, "nothing is reported unasked"
    finish(loader)
    assert told == [(7, here)]
    assert here not in ran
    assert loader.pending == 0


def test_what_work_raises_is_a_result(make: Callable[..., ThreadLoader]) -> None:
    loader = make()
    told: list[object] = []
    error = MemoryError("no more")

    def fail() -> None:
        raise error

    loader.submit(fail, told.append)
    loader.submit(lambda: 1, told.append)
    finish(loader)
    assert told == [error, 1]


@pytest.mark.parametrize(("error", "said"), [(Panic("at 3"), "Panic: at 3"), (SystemExit(2), "SystemExit: 2")])
def test_what_is_no_exception_is_a_result_too_and_ends_no_thread(
    make: Callable[..., ThreadLoader], error: BaseException, said: str
) -> None:
    loader = make()
    told: list[object] = []

    def fail() -> None:
        raise error

    for _ in range(3):
        loader.submit(fail, told.append)
    loader.submit(threading.get_ident, told.append)
    finish(loader)
    *failures, thread = told
    assert [(type(each), str(each)) for each in failures] == [(RuntimeError, said)] * 3
    assert all(isinstance(each, RuntimeError) and each.__cause__ is error for each in failures)
    assert thread in [each.ident for each in threads()]


def test_the_urgent_goes_first_and_the_rest_in_order(make: Callable[..., ThreadLoader]) -> None:
    loader, gate = make(1), threading.Event()
    told: list[object] = []
    loader.submit(gate.wait, told.append)
    while not threads() or loader._queue:
        time.sleep(0.001)
    for name in "ab":
        loader.submit(lambda name=name: name, told.append)
    for name in "yz":
        loader.submit(lambda name=name: name, told.append, urgent=True)
    gate.set()
    finish(loader)
    assert told == [True, "y", "z", "a", "b"]


def test_as_many_threads_as_work_and_no_more(make: Callable[..., ThreadLoader]) -> None:
    """Three pieces of work meet at a barrier; a fourth waits for one of them."""
    loader, barrier = make(3), threading.Barrier(3, timeout=60)
    running: set[int] = set()

    def meet() -> None:
        barrier.wait()
        running.add(threading.get_ident())

    told: list[object] = []
    for _ in range(6):
        loader.submit(meet, told.append)
    finish(loader)
    assert told == [None] * 6
    assert len(running) == 3


def test_work_for_which_the_system_has_no_thread_fails_and_later_work_does_not(
    make: Callable[..., ThreadLoader],
) -> None:
    loader, barrier = make(2), threading.Barrier(2, timeout=60)
    told: list[object] = []
    loader._stack_bytes = NO_MACHINE_HAS
    for _ in range(3):
        loader.submit(lambda: 1, told.append)
    assert loader.pending == 3
    finish(loader)
    assert [(type(each), str(each)) for each in told] == [(NoThread, "can't start new thread")] * 3
    loader._stack_bytes = 0
    for _ in range(2):
        loader.submit(barrier.wait, told.append)
    finish(loader)
    assert sorted(told[3:]) == [0, 1], "both threads there are"  # type: ignore[type-var]


def test_work_waits_for_the_threads_there_are_where_the_system_has_no_more(make: Callable[..., ThreadLoader]) -> None:
    loader, gate, started = make(2), threading.Event(), threading.Event()
    barrier = threading.Barrier(2, timeout=60)
    told: list[object] = []

    def first() -> int:
        started.set()
        gate.wait()
        return 1

    loader.submit(first, told.append)
    assert started.wait(60)
    loader._stack_bytes = NO_MACHINE_HAS
    for number in (2, 3):
        loader.submit(lambda number=number: number, told.append)
    loader.poll()
    assert not told
    gate.set()
    finish(loader)
    assert told == [1, 2, 3]
    loader._stack_bytes = 0
    for _ in range(2):
        loader.submit(barrier.wait, told.append)
    finish(loader)
    assert sorted(told[3:]) == [0, 1], "the second thread is there again"  # type: ignore[type-var]


def test_work_submitted_by_a_report_is_pending(make: Callable[..., ThreadLoader]) -> None:
    loader, told = make(), []

    def next_one(result: object) -> None:
        told.append(result)
        loader.submit(lambda: 2, told.append)

    loader.submit(lambda: 1, next_one)
    finish(loader)
    assert told == [1, 2]


def test_threads_end_without_work_and_come_back(
    make: Callable[..., ThreadLoader], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.01)
    prepared: list[int] = []
    loader = make(2, lambda: prepared.append(threading.get_ident()))
    told: list[object] = []
    for round_ in range(3):
        loader.submit(lambda: 1, told.append)
        finish(loader)
        while loader._threads:
            time.sleep(0.005)
        assert len(told) == len(prepared) == round_ + 1


def test_an_idle_thread_keeps_no_result_alive(make: Callable[..., ThreadLoader]) -> None:
    class Large:
        """What an adapter stands for."""

    loader = make()
    references: list[weakref.ref[Large]] = []
    loader.submit(Large, lambda result: references.append(weakref.ref(result)))  # type: ignore[arg-type]
    finish(loader)
    deadline = time.monotonic() + 60
    while references[0]() is not None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert references[0]() is None


@pytest.mark.parametrize("kind", [ValueError, Panic])
def test_work_that_failed_keeps_nothing_alive_of_what_it_had(
    make: Callable[..., ThreadLoader], kind: type[BaseException]
) -> None:
    """Nor until the garbage collector comes, to which a hundred megabytes of a library's are a small object."""

    class Large:
        """What the library had made until then."""

    references: list[weakref.ref[Large]] = []

    def fail() -> None:
        large = Large()
        references.append(weakref.ref(large))
        raise kind

    loader = make()
    gc.disable()
    try:
        loader.submit(fail, lambda _: None)
        finish(loader)
        deadline = time.monotonic() + 60
        while references[0]() is not None and time.monotonic() < deadline:
            time.sleep(0.001)
        assert references[0]() is None
    finally:
        gc.enable()


def test_close_begins_nothing_more_and_waits_for_what_runs() -> None:
    loader, gate, started = ThreadLoader(1), threading.Event(), threading.Event()
    ran: list[str] = []

    def slow() -> None:
        started.set()
        gate.wait()
        ran.append("slow")

    loader.submit(slow, lambda _: ran.append("told"))
    loader.submit(lambda: ran.append("next"), lambda _: None)
    started.wait()
    loader.close(0.0)
    gate.set()
    loader.close(60.0)
    assert ran == ["slow"]
    loader.poll()
    assert (ran, loader.pending, loader._threads) == (["slow"], 0, 0)
    with pytest.raises(RuntimeError, match="closed"):
        loader.submit(lambda: None, lambda _: None)


def test_waiting_ends_at_once_with_nothing_pending(make: Callable[..., ThreadLoader]) -> None:
    make().wait(1e6)


def test_at_least_one_thread() -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        ThreadLoader(0)
