"""What a conversation shows beside its answers."""

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from server.chat_screen import ChatScreen, route_line


@pytest.mark.parametrize(
    ("lora", "line"),
    [
        ({}, "the base model"),
        ({"router": None, "adapters": []}, "the base model"),
        ({"router": "explicit", "adapters": [{"name": "a", "weight": 1}]}, "a 1.00"),
        (
            {
                "router": "retriever",
                "composition": "mixture",
                "route_ms": 0.84,
                "adapters": [{"name": "a", "weight": 0.5, "score": 0.831}, {"name": "b", "weight": 0.5, "score": 0.7}],
            },
            "retriever chose a 0.50 (score 0.83), b 0.50 (score 0.70) in 0.8 ms",
        ),
        (
            {"router": "retriever", "cached": True, "adapters": [], "outcome": "below_min_score"},
            "retriever chose the base model remembered, since no adapter is similar enough to the prompt",
        ),
        (
            {"router": "gates", "route_ms": 2, "adapters": [{"name": "a", "weight": 1.0, "share": 0.61}]},
            "gates chose a 1.00 (share 61%) in 2.0 ms",
        ),
    ],
)
def test_routes_in_a_line(lora: dict[str, Any], line: str) -> None:
    assert route_line(lora) == line


def test_routes_are_explained_on_demand() -> None:
    lora = {
        "router": "retriever",
        "composition": "mixture",
        "cached": False,
        "route_ms": 1.0,
        "adapters": [{"name": "spell", "weight": 1.0, "score": 0.8}],
        "scores": [{"name": "spell", "score": 0.8}, {"name": "pirate", "score": 0.3}],
    }
    for explains in (False, True):
        answers, aside = Console(file=StringIO(), width=80), Console(file=StringIO(), width=80)
        ChatScreen(answers, aside).route(lora, 10, 2.0, explains=explains)
        shown = aside.file.getvalue()
        assert answers.file.getvalue() == ""
        assert shown.startswith("[retriever chose spell 1.00 (score 0.80) in 1.0 ms; 10 tokens, 5.0 tokens/s]\n")
        assert (["2", "pirate", "0.300"] in [line.split() for line in shown.splitlines()]) == explains
