"""One method's questions and what their answers are worth, kept in files: a run goes on where another was stopped."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters_store.types import Mix
from routing.evaluate.answers import Answer, Question, Steps, answered
from routing.evaluate.composites import Composite, judge
from routing.evaluate.gate_methods import GateMethod
from routing.evaluate.held_out import HeldOut
from routing.evaluate.quality import scores
from server.engine.gates import GateUse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Json = dict[str, Any]
ITEM_TOKENS = 6
"""Tokens of a list's number, of what follows it, and of the line's end."""

Prompt = tuple[tuple[int, ...], int]
"""Tokens, and the most tokens of the answer."""


@dataclass(frozen=True)
class Job:
    """One method's questions; `record` makes the line of answer `place` of them.

    `part` is "tasks", "loss", "composite-n" or "composite-n, item by item". `follow`, told place and answer, may ask
    more, with prompts that are longer by `room` tokens at most.
    """

    part: str
    method: str
    questions: Sequence[Question]
    record: Callable[[int, Answer], Json]
    follow: Callable[[int, Answer], Question | None] | None = None
    room: int = 0

    @property
    def longest(self) -> int:
        """The most tokens of a prompt and its answer."""
        return self.room + max(len(question.prompt) + question.max_tokens for question in self.questions)

    @property
    def identity(self) -> str:
        """sha256 over all that decides the answers, but for the model."""
        parts = [
            [question.prompt, question.max_tokens, question.mix.digest, _router_key(question), question.scored]
            for question in self.questions
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def file_name(self) -> str:
        return answers_file(self.part, self.method)


def answers_file(part: str, method: str) -> str:
    """The file of a job's lines, below `answers`: a head, then a line for each question."""
    name = re.sub(r"[^a-z0-9.]+", "-", f"{part}-{method}".lower()).strip("-")
    return f"{name}-{hashlib.sha256(method.encode()).hexdigest()[:6]}.jsonl"


def task_job(method: GateMethod, rows: Sequence[HeldOut], prompts: Sequence[Prompt]) -> Job:
    """Test rows of tasks, each under the method's mix for its task."""

    def record(place: int, answer: Answer) -> Json:
        row = rows[place]
        found = scores(row.metric, answer.text, row.references)
        line = {"task": row.task, "row": row.row, "answer": answer.text, "score": found["score"], "em": found["em"]}
        return line | {"wording": row.example.template} | routed(answer, method.rows.get(row.task))

    questions = [
        Question(prompt, limit, method.mix_for(row.task), method.gates, method.prompt_router)
        for row, (prompt, limit) in zip(rows, prompts, strict=True)
    ]
    return Job("tasks", method.name, questions, record)


def routed(answer: Answer, own: int | None) -> Json:
    """What a router did with the prompt, `own` being the row or expert of its task's adapter, if there is one.

    `share`: of the gates' weights, or of the layers, that the own one had. Of prompt-level routers also `chosen`, by
    layer, and `entropy`: of the probabilities, over its maximum, mean over the layers that were read.
    """
    decided = answer.decided
    if decided is None:
        return {} if own is None or not answer.shares else {"share": round(answer.shares[own], 5)}
    found: Json = {"chosen": decided.chosen}
    bits = [-sum(p * math.log(p) for p in layer if p > 0) / math.log(len(layer)) for layer in decided.probabilities]
    found["entropy"] = round(sum(bits) / len(bits), 5)
    if own is not None:
        found["share"] = round(sum(own in layer for layer in decided.chosen) / len(decided.chosen), 5)
    return found


def _router_key(question: Question) -> str | None:
    router = question.gates or question.prompt_router
    return None if router is None else router.key.hex()


def composite_job(
    method: GateMethod, composites: Sequence[Composite], prompts: Sequence[Prompt], metrics: Mapping[str, str]
) -> Job:
    """Prompts of several sub-questions, all under one mix, answered as the model will."""

    def record(place: int, answer: Answer) -> Json:
        return composite_line(composites[place], answer.text, metrics)

    questions = [Question(prompt, limit, method.mix, method.gates, method.prompt_router) for prompt, limit in prompts]
    return Job(f"composite-{len(composites[0].tasks)}", method.name, questions, record)


def guided_job(
    method: GateMethod,
    composites: Sequence[Composite],
    prompts: Sequence[Prompt],
    metrics: Mapping[str, str],
    limits: Mapping[str, int],
    tokenise: Callable[[str], tuple[int, ...]],
    stops: frozenset[int],
) -> Job:
    """The same prompts, of which the list is kept going: after every item's line the next number is given.

    What an item says is the method's own, and later items see it. `limits` are the most tokens of an item by its task,
    `stops` the tokens with a line end.
    """
    given: list[list[Answer]] = [[] for _ in composites]

    def question(place: int) -> Question:
        ids, tasks = prompts[place][0], composites[place].tasks
        before = [(*tokenise(f"{item}. "), *answer.tokens) for item, answer in enumerate(given[place], start=1)]
        begun = [token for line in before for token in (*line, *tokenise("\n"))] + [*tokenise(f"{len(before) + 1}. ")]
        return Question(
            (*ids, *begun), limits[tasks[len(before)]], method.mix, method.gates, method.prompt_router, stops
        )

    def follow(place: int, answer: Answer) -> Question | None:
        given[place].append(answer)
        return question(place) if len(given[place]) < len(composites[place].tasks) else None

    def record(place: int, _: Answer) -> Json:
        lines = [f"{item}. {answer.text}\n" for item, answer in enumerate(given[place], start=1)]
        return composite_line(composites[place], "".join(lines), metrics)

    questions = [question(place) for place in range(len(composites))]
    part = f"composite-{len(composites[0].tasks)}, item by item"
    room = max(sum(limits[task] + ITEM_TOKENS for task in composite.tasks) for composite in composites)
    return Job(part, method.name, questions, record, follow, room)


def composite_line(composite: Composite, answer: str, metrics: Mapping[str, str]) -> Json:
    """What is kept of an answer to a composite prompt."""
    found = judge(composite, answer, metrics)
    return {
        "row": composite.row,
        "tasks": composite.tasks,
        "answer": answer,
        "attempts": found.attempts,
        "correct": found.correct,
        "em": found.exact,
        "scores": [round(score, 5) for score in found.scores],
    }


def loss_job(
    method: GateMethod, rows: Sequence[HeldOut], prompts: Sequence[Prompt], targets: Sequence[tuple[int, ...]]
) -> Job:
    """How likely each row's target is. A prompt-level router decides first, by the prompt alone."""

    def scored(place: int, mix: Mix, gates: GateUse | None = None) -> Question:
        ids, target = prompts[place][0], targets[place]
        return Question((*ids, *target), 0, mix, gates, scored=len(target))

    def follow(place: int, answer: Answer) -> Question | None:
        use = method.prompt_router
        if use is None or answer.decided is None:
            return None
        chosen = [use.rows[expert] for expert in answer.decided.chosen[0] if expert < len(use.rows)]
        own = [digest for digest in chosen if digest is not None]
        return scored(place, Mix(tuple((digest, 1 / len(answer.decided.chosen[0])) for digest in sorted(own))))

    def record(place: int, answer: Answer) -> Json:
        return {"task": rows[place].task, "row": rows[place].row, "loss": answer.loss}

    questions = [
        scored(place, method.mix_for(row.task), method.gates)
        if method.prompt_router is None
        else Question(prompts[place][0], 1, method.mix, None, method.prompt_router)
        for place, row in enumerate(rows)
    ]
    room = max(map(len, targets)) if method.prompt_router is not None else 0
    return Job("loss", method.name, questions, record, follow, room)


def finished(job: Job, folder: Path, setting: Json) -> list[Json] | None:
    """The job's lines from an earlier run with the same questions in the same `setting`, None without one."""
    path = folder / job.file_name
    try:
        head, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return None
    same = isinstance(head, dict) and head.get("identity") == job.identity and head.get("setting") == setting
    return lines if same and len(lines) == len(job.questions) else None


def carry_out(
    jobs: Sequence[Job],
    engine: Steps,
    tokenizer: PreTrainedTokenizerBase,
    paths: Mapping[str, str],
    at_once: int,
    folder: Path,
    setting: Json,
) -> Iterator[tuple[Job, list[Json]]]:
    """Answers all questions in one stream, so that the batch stays full from one job to the next.

    Each job is written into `folder` and yielded with its lines as soon as its last answer is there.

    Raises:
        AnswerError: a request ends with an error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    owners = [(job, place) for job in jobs for place in range(len(job.questions))]
    lines: dict[str, dict[int, Json]] = {job.file_name: {} for job in jobs}
    questions = [question for job in jobs for question in job.questions]

    def follow(answer: Answer) -> Question | None:
        job, place = owners[answer.number]
        return None if job.follow is None else job.follow(place, answer)

    for answer in answered(engine, tokenizer, questions, paths, at_once, follow):
        job, place = owners[answer.number]
        own = lines[job.file_name]
        own[place] = job.record(place, answer)
        if len(own) == len(job.questions):
            found = [own[number] for number in range(len(own))]
            _write(folder / job.file_name, {"identity": job.identity, "setting": setting, "method": job.method}, found)
            yield job, json.loads(json.dumps(found))


def _write(path: Path, head: Json, lines: Sequence[Json]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (head, *lines))
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
