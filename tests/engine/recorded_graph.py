"""A CUDA graph's memory and rules, on a CPU: what is computed while it is captured is computed again, and only that.

Python runs once. Numbers that it passed to a kernel stay what they were, results go to the memory where the first ones
went, and what lay outside is read where it lay: if it has been freed since, the replay fails, where a GPU would read
what somebody else has written there. Whatever would have to wait for the device, or copies from the host's pageable
memory, is refused. Kernels of Triton are recorded under its interpreter.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

AT = torch.ops.aten
WAITS = frozenset(
    {
        AT._local_scalar_dense.default,
        AT.equal.default,
        AT.is_nonzero.default,
        AT.item.default,
        AT.lift_fresh.default,
        AT.masked_select.default,
        AT.nonzero.default,
        AT.repeat_interleave.Tensor,
        AT.unique_consecutive.default,
        AT._unique2.default,
    }
)
"""Operations whose result the host must know, and tensors made of the host's own data."""
INDEXED = frozenset({AT.index.Tensor, AT.index_put.default, AT.index_put_.default})
UNWRITTEN = frozenset({AT.empty.memory_format, AT.empty_strided.default, AT.empty_like.default, AT.new_empty.default})


class NotCapturable(RuntimeError):
    """What a GPU would refuse while a graph is captured."""


class Freed(RuntimeError):
    """A replay reads or writes memory that was freed after the capture."""


@dataclass(frozen=True)
class Outside:
    """A tensor that was there before the capture, without keeping its memory alive."""

    storage: StorageWeakRef
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> "Outside":
        storage = StorageWeakRef(tensor.untyped_storage())
        return cls(storage, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset())

    def tensor(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise Freed(f"{self.dtype}{list(self.size)} was freed after the graph that reads it was captured")
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.size, self.stride)


class Recorder(TorchDispatchMode):
    """Notes what is computed while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any, Sequence[Tensor]]] = []
        self._own: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        check(func, args)
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        results = [each for each in tree_flatten(result)[0] if isinstance(each, Tensor)]
        given = {_address(each) for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)}
        self._own |= {_address(each) for each in results} - given
        self.note(func, args, kwargs, [] if func in UNWRITTEN else results)
        return result

    def note(self, func: Callable[..., Any], args: Any, kwargs: Any, results: Sequence[Tensor]) -> None:
        self.calls.append((func, *tree_map(self._kept, (args, kwargs)), results))

    def _kept(self, value: object) -> object:
        is_outside = isinstance(value, Tensor) and _address(value) not in self._own
        return Outside.of(value) if is_outside else value  # type: ignore[arg-type]

    def replay(self) -> None:
        for func, args, kwargs, results in self.calls:
            args, kwargs = tree_map(_now, (args, kwargs))
            again = func(*args, **kwargs)
            found = [each for each in tree_flatten(again)[0] if isinstance(each, Tensor)] if results else []
            for first, second in zip(results, found, strict=True):
                if first.data_ptr() != second.data_ptr():
                    first.copy_(second)


def check(func: Any, args: Sequence[Any]) -> None:
    """Raises NotCapturable."""
    by_mask = func in INDEXED and any(each is not None and each.dtype is torch.bool for each in args[1])
    if func in WAITS or by_mask:
        raise NotCapturable(f"{func} waits for the device, or takes what only the host has")


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _now(value: object) -> object:
    return value.tensor() if isinstance(value, Outside) else value


class RecordedGraph:
    """Stands for `torch.cuda.CUDAGraph`."""

    recorder: Recorder | None = None
    """Of the graph that is being captured."""
    thread = 0
    """Which captures it: others, which read routers and adapters meanwhile, may wait for what they like."""
    is_launching = False
    """A kernel's interpreter may look into tensors."""
    refuses = False
    """Whether captures fail, as for lack of memory."""

    def __init__(self) -> None:
        self.replays = 0
        self._recorder = Recorder()

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        assert pool is not None
        assert capture_error_mode == "thread_local"
        if RecordedGraph.refuses:
            raise RuntimeError("out of memory")
        RecordedGraph.recorder, RecordedGraph.thread = self._recorder, threading.get_ident()
        self._recorder.__enter__()

    def capture_end(self) -> None:
        RecordedGraph.recorder = None
        self._recorder.__exit__(None, None, None)

    def replay(self) -> None:
        self.replays += 1
        self._recorder.replay()


def _refused_in_captures(method: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        is_captured = RecordedGraph.recorder is not None and RecordedGraph.thread == threading.get_ident()
        if is_captured and not RecordedGraph.is_launching:
            raise NotCapturable(f"{method.__name__} waits for the device")
        return method(*args, **kwargs)

    return called


class _Stream:
    def wait_stream(self, other: object) -> None:
        """Work on a CPU is done when it is launched."""


@contextmanager
def recorded_graphs() -> Iterator[None]:
    """Captures of graphs are recorded, kernels of Triton's interpreter among them."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def launched(executor: Any, *args: Any, **kwargs: Any) -> None:
        recorder = RecordedGraph.recorder
        if recorder is None:
            launch(executor, *args, **kwargs)
            return
        RecordedGraph.is_launching = True
        with _disable_current_modes():
            launch(executor, *args, **kwargs)
        RecordedGraph.is_launching = False
        recorder.note(lambda *args, **kwargs: launch(executor, *args, **kwargs), args, kwargs, [])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", launched)
        for name in ("tolist", "numpy"):  # on a CPU these read memory without an operation
            patch.setattr(Tensor, name, _refused_in_captures(getattr(Tensor, name)))
        patch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
        patch.setattr(torch.cuda, "graph_pool_handle", object)
        patch.setattr(torch.cuda, "Stream", lambda _: _Stream())
        patch.setattr(torch.cuda, "current_stream", _Stream)
        patch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: RecordedGraph.recorder is not None)
        yield
