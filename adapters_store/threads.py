"""Threads for work that somebody waits for, where the system may have none."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class NoThread(OSError):
    """The system has no thread for the work. It may have one later."""


class Threads(ThreadPoolExecutor):
    """The standard library's, but that work for which there is no thread is refused and then not done.

    That one refuses it as well, by RuntimeError, but has queued it before: it is done with what comes next, beside a
    second attempt of whoever was refused.
    """

    def submit(self, work: Callable[P, T], /, *args: P.args, **options: P.kwargs) -> "Future[T]":
        """Raises NoThread, also after `shutdown`."""
        result: Future[T] = Future()
        try:
            queued = super().submit(partial(_do, result, partial(work, *args, **options)))
        except RuntimeError as error:
            if result.cancel():  # else a thread has begun with it
                raise NoThread(str(error)) from error
        else:
            queued.add_done_callback(lambda queued: queued.cancelled() and result.cancel())
        return result


def _do(result: "Future[T]", work: Callable[[], T]) -> None:
    if result.set_running_or_notify_cancel():
        try:
            result.set_result(work())
        except BaseException as error:  # also a panic: whoever waits hears of it
            result.set_exception(error)
            del result  # which has the error, and that this frame
