"""Jobs are answered in one stream, are written as they end, and are not done twice."""

from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters_store.types import BASE
from routing.evaluate.answers import AnswerError, Question
from routing.evaluate.composites import Composite
from routing.evaluate.gate_jobs import Job, carry_out, composite_job, finished, guided_job, task_job
from routing.evaluate.gate_methods import GateMethod
from routing.evaluate.held_out import HeldOut
from routing.train.data import TaskRow
from server.engine.sequence import FinishReason, Output, Request


class Letters:
    """Tokens are letters."""

    def decode(self, tokens: tuple[int, ...], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(map(chr, tokens))

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(map(ord, text))


class Echo:
    """An engine that says the last two letters of a prompt, one a step, and ends one request a step."""

    def __init__(self, wrong: str | None = None) -> None:
        self.waiting: deque[Request] = deque()
        self.asked: list[Request] = []
        self.wrong = wrong

    @property
    def has_work(self) -> bool:
        return bool(self.waiting)

    def add_request(self, request: Request) -> None:
        assert request.id not in {other.id for other in self.waiting}
        self.asked.append(request)
        self.waiting.append(request)

    def step(self) -> list[Output]:
        request = self.waiting.popleft()
        if self.wrong is not None and self.wrong == chr(request.prompt[0]):
            return [Output(request.id, finish_reason=FinishReason.ERROR, error="no")]
        first, last = request.prompt[-2:]
        ended = Output(request.id, tokens=(last,), finish_reason=FinishReason.STOP, shares=(0.0, 1.0))
        return [Output(request.id, tokens=(first,), shares=(0.5, 0.5)), ended]


def letters(text: str) -> tuple[int, ...]:
    return tuple(map(ord, text))


ROWS = [
    HeldOut("t", row, TaskRow("t", "c", "Say", text, text, 3 * row), (text,), "em") for row, text in enumerate("ab")
]
PROMPTS = [(letters("xxaa"), 8), (letters("yybb"), 8)]
COMPOSITES = [Composite(0, "?", ("t", "u"), (("1.",), (". ",)))]
SETTING = {"dtype": "float32"}
METRICS = {"t": "em", "u": "em"}


def run(jobs: list[Job], folder: Path, engine: Echo | None = None, at_once: int = 2) -> list[tuple[Job, Any]]:
    tokenizer: Any = Letters()
    return list(carry_out(jobs, engine or Echo(), tokenizer, {}, at_once, folder, SETTING))


def test_each_job_is_written_with_its_scores_and_found_again(tmp_path: Path) -> None:
    jobs = [task_job(GateMethod(name, rows={"t": 1}), ROWS, PROMPTS) for name in ("base", "Gates, top 2")]
    done = run(jobs, tmp_path, at_once=3)
    assert [job.method for job, _ in done] == ["base", "Gates, top 2"]
    expected = [
        {"task": "t", "row": 0, "answer": "aa", "score": 0.0, "em": 0.0, "wording": 0, "share": 0.75},
        {"task": "t", "row": 1, "answer": "bb", "score": 0.0, "em": 0.0, "wording": 3, "share": 0.75},
    ]
    assert [lines for _, lines in done] == [expected, expected]
    assert finished(jobs[0], tmp_path, SETTING) == expected
    assert finished(jobs[0], tmp_path, {"dtype": "other"}) is None
    assert finished(task_job(GateMethod("base"), ROWS, [PROMPTS[0], (letters("z"), 8)]), tmp_path, SETTING) is None
    assert finished(task_job(GateMethod("base"), ROWS, [PROMPTS[0], (letters("yybb"), 9)]), tmp_path, SETTING) is None
    assert finished(task_job(GateMethod("other"), ROWS, PROMPTS), tmp_path, SETTING) is None
    (tmp_path / jobs[0].file_name).write_text("{}\n{")
    assert finished(jobs[0], tmp_path, SETTING) is None


def test_methods_of_like_names_have_files_of_their_own() -> None:
    names = {task_job(GateMethod(name), ROWS, PROMPTS).file_name for name in ("a b", "a-b", "A b", "a  b")}
    assert len(names) == 4


def test_what_ended_before_an_error_is_kept(tmp_path: Path) -> None:
    jobs = [task_job(GateMethod("first"), ROWS, PROMPTS), task_job(GateMethod("second"), ROWS, [(letters("!"), 1)] * 2)]
    with pytest.raises(AnswerError, match="question 2: no"):
        run(jobs, tmp_path, Echo(wrong="!"), at_once=1)
    assert finished(jobs[0], tmp_path, SETTING) is not None
    assert finished(jobs[1], tmp_path, SETTING) is None


def test_a_composite_prompt_is_answered_freely() -> None:
    job = composite_job(GateMethod("base"), COMPOSITES, [(letters("?"), 20)], METRICS)
    assert (job.part, job.longest) == ("composite-2", 21)
    assert job.questions == [Question(letters("?"), 20, BASE)]


def test_a_list_is_kept_going_item_by_item(tmp_path: Path) -> None:
    stops, limits = frozenset({10}), {"t": 10, "u": 7}
    job = guided_job(GateMethod("base"), COMPOSITES, [(letters("?"), 20)], METRICS, limits, letters, stops)
    engine = Echo()
    [(_, [line])] = run([job], tmp_path, engine)
    asked = ["".join(map(chr, request.prompt)) for request in engine.asked]
    assert asked == ["?1. ", "?1. . \n2. "]  # what it said before, and the next number
    assert [(request.params.max_tokens, request.params.stop_token_ids) for request in engine.asked] == [
        (10, stops),
        (7, stops),
    ]
    assert max(len(request.prompt) + request.params.max_tokens for request in engine.asked) <= job.longest
    assert (line["answer"], line["attempts"]) == ("1. .\n2. .\n", 2)
    again = guided_job(GateMethod("base"), COMPOSITES, [(letters("?"), 20)], METRICS, limits, letters, stops)
    assert finished(again, tmp_path, SETTING) == [line]
    assert job.file_name != replace(job, part="composite-2").file_name
