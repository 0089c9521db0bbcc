"""instructor over a real socket: a server with the small model, and one whose words are known."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from client_venv import needs_clients, run
from fakes import Harness, wait_for
from served import Served

from server.tools.form import HERMES

pytestmark = [pytest.mark.slow, needs_clients]
ADAPTERS = Path(__file__).parents[2] / "deploy" / "demo" / "adapters"
EMMA = {"name": "Emma", "age": 48}


@pytest.fixture(scope="module")
def said(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = ("--adapters", str(ADAPTERS), "--max-model-len", "1024", "--page-memory", "64MiB")
    served = Served(smollm2, tmp_path_factory.mktemp("data"), *options)
    try:
        yield wait_for(run("instructor_runs.py", "forced", served.url))
    finally:
        code = served.stop()
    assert code == 0


def is_person(value: Any) -> bool:
    """Whether it has the right form; what a forced call of a small model says is another thing."""
    return len(value["name"]) <= 12 and 0 <= value["age"] <= 120


def test_every_mode_gives_what_was_asked_for(said: Any) -> None:
    for mode, whole in said["modes"].items():
        assert is_person(whole["answer"])
        assert whole["route"] == ["json_fields"]
        if "TOOLS" not in mode:  # the adapter was not trained to call functions
            assert whole["answer"] == EMMA
    assert len(said["modes"]) == 5


def test_nested_models_and_mixes(said: Any) -> None:
    team = said["nested"]["answer"]
    assert len(team["people"]) == 2
    assert all(map(is_person, team["people"]))
    assert team["job"]["title"] in ("surgeon", "baker", "pilot")
    assert said["nested"]["route"] == []
    assert said["mix"] == {"answer": EMMA, "route": ["json_fields", "spell"]}
    assert said["async"] == [EMMA, EMMA]


def test_partial_answers_grow(said: Any) -> None:
    for states in said["partial"].values():
        assert states[0] == {"name": None, "age": None}
        assert is_person(states[-1])
        names = [state["name"] or "" for state in states]
        assert all(later.startswith(earlier) for earlier, later in pairwise(names))
        assert len(set(names)) > 2, "it streams"
    assert len(said["partial"]) == 3
    assert len(said["iterable"]) >= 1
    assert all(map(is_person, said["iterable"]))


def test_retries_show_the_model_its_mistake(said: Any) -> None:
    """Each attempt has the answer before it, as an assistant's message or call, and what was wrong with it."""
    for retried in said["retried"].values():
        assert is_person(retried["answer"])
        first, second = retried["messages"]
        assert second == first + 2
    assert said["given up"] == {"answer": "gave up after 3", "messages": [1, 3, 5]}


async def test_parallel_calls(live: str, harness: Harness) -> None:
    calls = [("Person", EMMA), ("Job", {"title": "surgeon", "city": "Rome"})]
    assert harness.engine.info is not None
    harness.engine.info = replace(harness.engine.info, max_model_len=4096)
    harness.engine.say("".join(HERMES.write(name, arguments) for name, arguments in calls))
    assert await run("instructor_runs.py", "parallel", live) == [{name: arguments} for name, arguments in calls]
