"""The graph that stands for a GPU's in tests keeps to the rules of one."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from tests.engine.recorded_graph import Freed, NotCapturable, RecordedGraph, recorded_graphs


@pytest.fixture(autouse=True)
def _recorded() -> object:
    with recorded_graphs(), torch.inference_mode():
        yield


def capture(work: object) -> RecordedGraph:
    graph = RecordedGraph()
    graph.capture_begin(object(), "thread_local")
    try:
        work()  # type: ignore[operator]
    finally:
        graph.capture_end()
    return graph


def test_a_replay_reads_anew_and_writes_to_the_same_memory() -> None:
    x, factor, seen = torch.ones(3), [2.0], []

    def work() -> None:
        seen.append((x * factor[0]).view(1, 3) + 1)

    graph = capture(work)
    x.fill_(5.0)
    factor[0] = 100.0  # Python runs once
    graph.replay()
    assert len(seen) == 1
    assert seen[0].tolist() == [[11.0, 11.0, 11.0]]


def test_in_place_operations_and_views_of_their_results() -> None:
    total, x = torch.zeros(4), torch.arange(4.0)

    def work() -> None:
        part = total[1:3]
        part.add_(x[1:3])
        torch.cat([part, part], out=other)

    other = torch.empty(4)
    graph = capture(work)
    graph.replay()
    assert total.tolist() == [0, 2, 4, 0]
    assert other.tolist() == [2, 4, 2, 4]


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 1],
        lambda x: x.index_put_((x > 1,), torch.zeros(())),
        lambda x: torch.tensor([1.0, 2.0]) + x[:2],
        lambda x: x.tolist(),
        lambda x: torch.equal(x, x),
    ],
)
def test_what_waits_for_the_device_is_refused(work: object) -> None:
    x = torch.arange(3.0)
    with pytest.raises(NotCapturable):
        capture(lambda: work(x))  # type: ignore[operator]


def test_other_threads_may_wait_meanwhile() -> None:
    """As the loader's do, which read what the next step needs."""
    x, found = torch.arange(3.0), list[object]()
    with ThreadPoolExecutor(1) as pool:
        capture(lambda: found.append(pool.submit(x.tolist).result()))
    assert found == [[0.0, 1.0, 2.0]]


def test_memory_that_was_freed_is_noticed() -> None:
    kept: list[Tensor] = [torch.ones(2)]
    out = torch.zeros(2)
    graph = capture(lambda: out.copy_(kept[0] + 1))
    graph.replay()
    kept[0] = torch.ones(2)
    with pytest.raises(Freed):
        graph.replay()
