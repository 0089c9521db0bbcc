"""Outputs under a constraint: always of its language, whatever else is asked for and whatever shares the batch."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from tokenizers import Tokenizer

from server.engine.config import EngineConfig
from server.engine.constraint import Constraint, ConstraintKind
from server.engine.engine import Engine
from server.engine.sequence import FinishReason, Output, Request, SamplingParams
from tests.engine.spoken import spoken, tokenizer
from tests.engine.test_engine import PROMPTS, drain
from tests.engine.test_lookahead import DelayedSteps

SMALL = {"device": "cpu", "kv_memory": 1 << 22, "page_memory": 1 << 22}
BLOCK_BYTES = 16 * 2 * 3 * 2 * 16 * 4
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["x", "y\n", "ü"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
CHOICES = ["yes", "no", 'may"be\\\n', "漢字"]
SCHEMA = Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(PERSON))
REGEX = Constraint(ConstraintKind.REGEX, r"[a-c]{2,9}-\d{1,5}(\.\d{2})?!")
CHOICE = Constraint(ConstraintKind.CHOICE, json.dumps(CHOICES))
LARK = Constraint(ConstraintKind.GRAMMAR, 'start: NUMBER ("+" NUMBER){1,3}\nNUMBER: /[0-9]{1,4}/')
GBNF = Constraint(ConstraintKind.GRAMMAR, 'root ::= "(" part? ")" | "[" part "]"\npart ::= [a-z] | "<" [0-9] ">"')
OBJECT = Constraint(ConstraintKind.JSON_OBJECT)
ALL = [SCHEMA, REGEX, CHOICE, LARK, GBNF]
GREEDY = SamplingParams(temperature=0.0, max_tokens=120)
WAYS = {
    "greedy": GREEDY,
    "sampled": replace(GREEDY, temperature=1.0, seed=3),
    "cut": replace(GREEDY, temperature=1.5, top_k=40, top_p=0.9, min_p=0.01, seed=4),
    "penalised": replace(GREEDY, presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.3),
    "biased": replace(GREEDY, logit_bias=dict.fromkeys(range(2, 60), -100.0), logprobs=2),
}

Make = Callable[..., Engine]


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return spoken(tiny_model, tmp_path_factory.mktemp("spoken") / "model")


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return tokenizer()


@pytest.fixture
def make(model: Path) -> Make:
    """`make(ahead, **settings)`: an engine whose host is one step ahead or not."""

    def engine(ahead: bool = False, **options: object) -> Engine:
        made = Engine.from_config(EngineConfig(str(model), **{**SMALL, **options}))  # type: ignore[arg-type]
        if ahead:
            made.runner.steps = DelayedSteps(made.runner, made.config.block_size)
        return made

    return engine


def matches(constraint: Constraint, text: str) -> bool:
    match constraint.kind:
        case ConstraintKind.JSON_SCHEMA:
            jsonschema.validate(json.loads(text), json.loads(constraint.source))
            return True
        case ConstraintKind.JSON_OBJECT:
            return isinstance(json.loads(text), dict)
        case ConstraintKind.REGEX:
            return re.fullmatch(constraint.source, text) is not None
        case ConstraintKind.CHOICE:
            return text in json.loads(constraint.source)
        case ConstraintKind.GRAMMAR:
            pattern = r"\d{1,4}(\+\d{1,4}){1,3}" if constraint is LARK else r"\(([a-z]|<\d>)?\)|\[([a-z]|<\d>)\]"
            return re.fullmatch(pattern, text) is not None


def outputs_of(engine: Engine, requests: Sequence[Request]) -> dict[str, list[Output]]:
    for request in requests:
        engine.add_request(request)
    return drain(engine)


def text_of(outputs: list[Output], words: Tokenizer) -> str:
    return str(words.decode([token for output in outputs for token in output.tokens]))


def constrained(params: SamplingParams, constraint: Constraint | None) -> SamplingParams:
    return replace(params, constraint=constraint)


def batch() -> list[Request]:
    """Every way with every constraint, and as many free rows between them."""
    requests = []
    for number, (way, params) in enumerate(WAYS.items()):
        for constraint in ALL:
            name = f"{way} {constraint.kind} {constraint is GBNF}"
            prompt = PROMPTS[number % len(PROMPTS)]
            requests.append(Request(name, prompt, constrained(params, constraint)))
            requests.append(Request(f"{name} free", prompt, replace(params, max_tokens=20)))
    return requests


def texts(outputs: dict[str, list[Output]]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(token for output in own for token in output.tokens) for name, own in outputs.items()}


@pytest.mark.parametrize("ahead", [False, True])
def test_every_output_is_of_its_language(make: Make, words: Tokenizer, ahead: bool) -> None:
    engine = make(ahead)
    outputs = outputs_of(engine, batch())
    for request in batch():
        own, constraint = outputs[request.id], request.params.constraint
        if constraint is not None:
            assert own[-1].finish_reason is FinishReason.STOP, request.id
            assert matches(constraint, text_of(own, words)), request.id
        assert len([output for output in own if output.logprobs]) == (
            len(texts(outputs)[request.id]) * ("biased" in request.id)
        )
    assert engine.arrivals.grammars is not None
    assert len(engine.arrivals.grammars) == len(ALL), "one compilation for equal constraints"


def test_constrained_and_free_rows_give_what_each_gives_alone(make: Make) -> None:
    together = texts(outputs_of(make(), batch()))
    ahead = texts(outputs_of(make(True), batch()))
    few_blocks = make(True, kv_memory=24 * BLOCK_BYTES, max_model_len=256, max_num_seqs=12)
    preempted = texts(outputs_of(few_blocks, batch()))
    alone = make()
    for request in batch():
        assert texts(outputs_of(alone, [request]))[request.id] == together[request.id]
    assert ahead == together
    assert preempted == together
    assert few_blocks.scheduler.preemptions > 0
