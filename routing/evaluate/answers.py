"""Greedy answers of many questions, each under its own mix of adapters, by the engine in this process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from adapters_store.peft_format import CONFIG_NAME, WEIGHTS_NAME
from adapters_store.types import Mix
from routing.train.batches import prompt_text
from routing.train.data import TaskRow, read_rows
from server.engine.gates import GateUse
from server.engine.prompt_routers import Decided, PromptUse
from server.engine.sequence import Output, Request, SamplingParams
from server.model.config import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WAITING = 4
"""Requests handed to the engine for each row of its batch: some read adapters while others decode."""

MARGIN = 8
"""Tokens that an answer may be longer than the longest target of its task's training rows."""


class AnswerError(Exception):
    """The engine did not answer a question; the message says which and why."""


class Steps(Protocol):
    """The part of the engine that is used."""

    @property
    def has_work(self) -> bool: ...

    def add_request(self, request: Request) -> None: ...

    def step(self) -> list[Output]: ...


@dataclass(frozen=True)
class Question:
    """A prompt in tokens, the most tokens of its answer, and the adapters that answer it.

    `gates` weigh them anew for every token, a `prompt_router` chooses among them once. `stops` are tokens that end the
    answer, beside those of the model. With `scored` nothing is answered: so many of the prompt's last tokens are asked
    how likely they were.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    mix: Mix
    gates: GateUse | None = None
    prompt_router: PromptUse | None = None
    stops: frozenset[int] = frozenset()
    scored: int = 0


@dataclass(frozen=True)
class Answer:
    """The greedy answer to question `number`, stripped.

    `shares`: the gates' rows' weights, mean over its tokens. `decided`: what a prompt-level router chose. `loss`: of
    scored tokens, mean negative log-likelihood in nats.
    """

    number: int
    text: str
    shares: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()
    decided: Decided | None = None
    loss: float | None = None


@dataclass(frozen=True)
class AdapterFolders:
    """Adapters under one folder by name: their digests, and their paths by digest."""

    digests: dict[str, str]
    paths: dict[str, str]

    @classmethod
    def find(cls, root: Path, names: Iterable[str]) -> AdapterFolders:
        """The PEFT folders `<root>/<name>`. Raises AnswerError where one is missing."""
        return cls.of({name: root / name for name in sorted(set(names))})

    @classmethod
    def of(cls, folders: Mapping[str, Path]) -> AdapterFolders:
        """PEFT folders by name. Raises AnswerError where one is missing."""
        digests: dict[str, str] = {}
        for name, folder in folders.items():
            files = [folder / file for file in (CONFIG_NAME, WEIGHTS_NAME)]
            if missing := [file for file in files if not file.is_file()]:
                raise AnswerError(f"{missing[0]}: no such file, expected a trained adapter for {name}")
            content = b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)
            digests[name] = hashlib.sha256(name.encode() + b"\0" + content).hexdigest()
        return cls(digests, {digests[name]: str(folder) for name, folder in folders.items()})


def open_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """Raises ModelError."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"{folder}: expected a tokenizer that can be read ({reason})") from error
    return tokenizer


def answer_limits(tokenizer: PreTrainedTokenizerBase, tasks: Path, names: Iterable[str]) -> dict[str, int]:
    """The most tokens of an answer, by task."""
    limits = {}
    for name in names:
        targets = [row.target for row in read_rows(tasks / name / "train.jsonl")]
        limits[name] = MARGIN + max(len(ids) for ids in tokenizer(targets, add_special_tokens=False)["input_ids"])
    return limits


def tokenise(tokenizer: PreTrainedTokenizerBase, row: TaskRow) -> tuple[int, ...]:
    """The row's prompt as a server hands it to the engine."""
    return tuple(tokenizer(prompt_text(tokenizer, row), add_special_tokens=False)["input_ids"])


def answer_tokens(tokenizer: PreTrainedTokenizerBase, row: TaskRow) -> tuple[int, ...]:
    """The row's target and the end of turn, as they follow its prompt in training."""
    ids: list[int] = tokenizer(row.target, add_special_tokens=False)["input_ids"]
    return (*ids, tokenizer.eos_token_id)


def answers(
    engine: Steps,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    paths: Mapping[str, str],
    at_once: int,
    progress: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """The greedy answer to each question, stripped; `at_once` requests are with the engine at a time.

    `progress` is told the number of finished ones. Raises AnswerError where a request ends with an error.
    """
    found = [""] * len(questions)
    for done, answer in enumerate(answered(engine, tokenizer, questions, paths, at_once), start=1):
        found[answer.number] = answer.text
        progress(done)
    return found


def answered(
    engine: Steps,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    paths: Mapping[str, str],
    at_once: int,
    follow: Callable[[Answer], Question | None] = lambda _: None,
) -> Iterator[Answer]:
    """Each answer as it ends; `paths` are adapters' folders by digest.

    `follow` is told every answer, and may ask more under the same number: then only the last of them is yielded.
    Raises AnswerError as `answers`.
    """
    asked: dict[int, _Asked] = {}
    begun = 0
    while asked or begun < len(questions):
        while begun < len(questions) and len(asked) < at_once:
            engine.add_request(_request(begun, questions[begun], paths))
            asked[begun] = _Asked(questions[begun])
            begun += 1
        for output in engine.step():
            number = int(output.request_id)
            if output.error is not None:
                raise AnswerError(f"question {number}: {output.error}")
            asked[number].outputs.append(output)
            if output.finish_reason is not None:
                answer = asked.pop(number).answer(number, tokenizer)
                if (more := follow(answer)) is None:
                    yield answer
                else:
                    engine.add_request(_request(number, more, paths))
                    asked[number] = _Asked(more)


@dataclass
class _Asked:
    """A question with what the engine has said so far."""

    question: Question
    outputs: list[Output] = field(default_factory=list)

    def answer(self, number: int, tokenizer: PreTrainedTokenizerBase) -> Answer:
        tokens = tuple(token for output in self.outputs for token in output.tokens)
        shares = [output.shares for output in self.outputs if output.shares]
        scores = [each.logprob for output in self.outputs for each in output.prompt_logprobs]
        scored = self.question.scored
        return Answer(
            number,
            str(tokenizer.decode(tokens, skip_special_tokens=True)).strip(),
            _mean(shares),
            tokens,
            next((output.decided for output in self.outputs if output.decided is not None), None),
            -sum(scores[-scored:]) / scored if scored else None,
        )


def _mean(shares: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(sum(column) / len(shares) for column in zip(*shares, strict=True))


def _request(number: int, question: Question, paths: Mapping[str, str]) -> Request:
    params = SamplingParams(
        temperature=0.0,
        max_tokens=question.max_tokens,
        stop_token_ids=question.stops,
        prompt_logprobs=0 if question.scored else None,
    )
    own = {digest: paths[digest] for digest in question.mix.digests}
    gates, prompt_router = question.gates, question.prompt_router
    return Request(str(number), question.prompt, params, question.mix, own, gates=gates, prompt_router=prompt_router)
