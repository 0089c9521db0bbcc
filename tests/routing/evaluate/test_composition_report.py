import numpy as np
import pytest

from routing.evaluate.composition_report import Table, markdown


@pytest.fixture
def table() -> Table:
    scores = np.array(
        [
            [1.0, 0.0, 1.0, 1.0, 1.0],
            [1.0, 1.0, 1.0, 1.0, 1.0],
            [0.0, 0.0, 0.0, 0.0, 0.5],
        ]
    )
    settings = ("selection/id", "mixture/id", "base")
    return Table(settings, ("a", "a", "b", "b", "c"), ("x", "x", "x", "x", "y"), scores)


def test_every_task_counts_the_same(table: Table) -> None:
    found = table.result({"few": ["b", "c"]})
    assert found["selection/id"]["tasks"] == {"a": 0.5, "b": 1.0, "c": 1.0}
    assert found["selection/id"]["mean"] == pytest.approx(2.5 / 3)
    assert found["selection/id"]["clusters"] == {"x": 0.75, "y": 1.0}
    assert found["base"]["mean"] == pytest.approx(0.5 / 3)
    assert found["base"]["groups"] == {"few": 0.25}


def test_intervals(table: Table) -> None:
    found = table.result({})
    assert found["mixture/id"]["interval"] == pytest.approx([1.0, 1.0])
    # task a is 0, 1/2 or 1 with probabilities 1/4, 1/2, 1/4; b and c are 1
    assert found["selection/id"]["interval"] == pytest.approx([2 / 3, 1.0])
    above = found["mixture/id"]["above_selection"]
    assert above["mean"] == pytest.approx(1 / 6)
    assert above["interval"] == pytest.approx([0.0, 1 / 3])
    assert found["selection/id"]["above_selection"] is None
    assert found["base"]["above_selection"] is None


def test_the_interval_is_that_of_the_normal_approximation() -> None:
    rng = np.random.default_rng(3)
    scores = (rng.random((1, 400)) < 0.3).astype(float)
    table = Table(("base",), tuple("ab"[i % 2] for i in range(400)), ("x",) * 400, scores)
    low, high = table.result({})["base"]["interval"]
    mean = scores.mean()
    half = 1.96 * np.sqrt(mean * (1 - mean) / 400)
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.01)
    assert table.result({}, seed=1)["base"]["interval"] != [low, high]
    assert table.result({})["base"]["interval"] == [low, high]


def test_markdown(table: Table) -> None:
    text = markdown(table.result({"few": ["b"]}), {"a": "em", "b": "em", "c": "rougeL"}, {"a": 2, "b": 2, "c": 1})
    lines = text.splitlines()
    assert lines[0] == "| setting | mean | 95 % interval | above selection | few |"
    assert "| mixture/id | 100.0 | 100.0 to 100.0 | +16.7 (+0.0 to +33.3) | 100.0 |" in lines
    assert "| base | 16.7 | 16.7 to 16.7 |  | 0.0 |" in lines
    assert "| x | 75.0 | 100.0 | 0.0 |" in lines
    assert lines[-1] == "| c | rougeL | 1 | 100.0 | 100.0 | 50.0 |"
