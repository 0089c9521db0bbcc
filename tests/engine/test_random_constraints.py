"""Random constraints, and what a random model says under them."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from server.engine.config import EngineConfig
from server.engine.constraint import Constraint, ConstraintKind
from server.engine.engine import Engine
from server.engine.masks import shared_out
from server.engine.matching import QUICK_SECONDS, SLOW_SECONDS, Moves
from server.engine.runner import Launched
from server.engine.sequence import FinishReason, Output, Request, SamplingParams
from tests.engine.constrained_requests import ALL, BLOCK_BYTES, LazyMasks, batch, compile_all
from tests.engine.constraints import regex, schema
from tests.engine.delayed_steps import make_engine
from tests.engine.spoken import SPECIAL
from tests.engine.tiny_engine import PROMPTS, drain, outputs_of, texts


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    engine = Engine.from_config(EngineConfig(str(model), device="cpu", kv_memory=1 << 24, page_memory=1 << 20))
    yield engine
    engine.close()


SCALARS = st.none() | st.booleans() | st.integers(-50, 50) | st.text('ab é"\\\n', max_size=3)
NAMES = st.text("abc_", min_size=1, max_size=3)
FEW = st.integers(0, 2)


def integers(low: int, width: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": low, "maximum": low + width}


def strings(least: int, more: int) -> dict[str, Any]:
    return {"type": "string", "minLength": least, "maxLength": least + more}


def arrays(items: Any, least: int, more: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": least + more}


def objects(properties: dict[str, Any], optional: set[str]) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


SIMPLE = [{"type": "boolean"}, {"type": ["boolean", "null"]}, {"type": "string", "pattern": "^[a-c]{1,4}x?$"}]
SCHEMAS = st.recursive(
    st.sampled_from(SIMPLE)
    | st.builds(integers, st.integers(-99, 99), st.integers(0, 200))
    | st.builds(strings, FEW, st.integers(0, 4))
    | st.fixed_dictionaries({"enum": st.lists(SCALARS, min_size=1, max_size=4)})
    | st.fixed_dictionaries({"const": SCALARS}),
    lambda parts: (
        st.builds(objects, st.dictionaries(NAMES, parts, max_size=3), st.sets(NAMES))
        | st.builds(arrays, parts, FEW, FEW)
        | st.fixed_dictionaries({"anyOf": st.lists(parts, min_size=1, max_size=3)})
    ),
    max_leaves=6,
)

PIECES = st.sampled_from(["a", "b", "é", r"\.", "[a-f]", "[^a-z\n]", r"[0-9]", "(ab|c)", " ", "漢"])
REGEXES = st.recursive(
    PIECES,
    lambda parts: (
        st.builds("".join, st.lists(parts, min_size=1, max_size=3))
        | st.builds("({}|{})".format, parts, parts)
        | st.builds(lambda one, least, more: f"({one}){{{least},{least + more}}}", parts, FEW, FEW)
    ),
    max_leaves=6,
)


def text_of(engine: Engine, words: Tokenizer, constraint: Constraint, seed: int) -> str | None:
    """What the random model says under the constraint; None if it came to no end. See the test of special tokens."""
    assume(not any(special in constraint.source for special in SPECIAL))
    params = SamplingParams(seed=seed, max_tokens=400, constraint=constraint)
    engine.add_request(Request("r", (7, 8, 9), params))
    outputs = drain(engine)["r"]
    assert outputs[-1].error is None
    if outputs[-1].finish_reason is not FinishReason.STOP:
        return None
    return str(words.decode([token for output in outputs for token in output.tokens]))


@settings(max_examples=40, deadline=None)
@given(SCHEMAS, st.integers(0, 1000))
def test_random_schemas_hold(engine: Engine, words: Tokenizer, value: Any, seed: int) -> None:
    text = text_of(engine, words, schema(value), seed)
    assert text is not None
    jsonschema.validate(json.loads(text), value)


@settings(max_examples=40, deadline=None)
@given(REGEXES, st.integers(0, 1000))
def test_random_regular_expressions_hold(engine: Engine, words: Tokenizer, pattern: str, seed: int) -> None:
    text = text_of(engine, words, regex(pattern), seed)
    assert text is not None
    assert re.fullmatch(pattern, text)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=6), min_size=1, max_size=5), st.integers(0, 1000))
def test_random_choices_hold(engine: Engine, words: Tokenizer, choices: list[str], seed: int) -> None:
    text = text_of(engine, words, Constraint(ConstraintKind.CHOICE, json.dumps(choices)), seed)
    assert text in choices


def test_what_is_but_the_spelling_of_a_special_token_is_refused(engine: Engine) -> None:
    """The library reads the token in the text that it forces, and that is none that the grammar takes."""
    engine.add_request(Request("r", (7, 8, 9), SamplingParams(max_tokens=20, constraint=regex("<s>"))))
    (output,) = drain(engine)["r"]
    assert (output.finish_reason, output.error_code) == (FinishReason.ERROR, "invalid_constraint")


class ErraticMasks(LazyMasks):
    """Computes most masks when they are waited for and the others later. Some count as slow, or not as quick."""

    def __init__(self, draws: random.Random) -> None:
        super().__init__(0)
        self.draws = draws

    def advance(self, moves: Moves) -> None:
        for own, _ in moves:
            if self.draws.random() < 0.2:
                own.seconds = self.draws.choice([0.0, 0.0, 2 * QUICK_SECONDS, 2 * SLOW_SECONDS])
        super().advance(moves)

    def wait(self, *_: object) -> None:
        some = [move for move in self.moves if self.draws.random() < 0.9]
        self.moves = [move for move in self.moves if move not in some]
        self._run(shared_out(some))

    outwait = wait


ROWS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 1.0]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.0]),
    seed=st.integers(0, 3),
    max_tokens=st.sampled_from([3, 40, 40]),
    min_tokens=st.sampled_from([0, 0, 2]),
    constraint=st.sampled_from([None, *ALL, *ALL[:2], *ALL[:2]]),
)


@pytest.fixture(scope="module")
def ahead(model: Path) -> Iterator[Engine]:
    """With memory for few of its rows."""
    engine = make_engine(model, kv_memory=8 * BLOCK_BYTES, max_model_len=128, max_num_seqs=6)
    compile_all(engine, batch())
    yield engine
    engine.close()


@settings(max_examples=25, deadline=None)
@given(st.lists(ROWS, min_size=4, max_size=12), st.integers(0, 1 << 32))
def test_when_masks_begin_and_when_they_come_changes_nothing(
    engine: Engine, ahead: Engine, rows: list[SamplingParams], seed: int
) -> None:
    """Whatever is late or slow, and comes, is preempted or aborted meanwhile."""
    requests = [Request(str(row), PROMPTS[row % 4], params) for row, params in enumerate(rows)]
    usual = texts(outputs_of(engine, requests))
    draws, coming, outputs = random.Random(seed), list(requests), dict[str, list[Output]]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launched, "ended", property(lambda _: draws.random() < 0.5))
        patch.setattr(ahead, "masks", ErraticMasks(draws))
        while coming or ahead.has_work:
            for _ in range(min(len(coming), draws.randrange(4))):
                ahead.add_request(coming.pop(0))
            if draws.random() < 0.04:
                ahead.abort(draws.choice(requests).id)
            for output in ahead.step():
                outputs.setdefault(output.request_id, []).append(output)
            ahead.check_integrity()
    for name, own in outputs.items():
        tokens = tuple(token for output in own for token in output.tokens)
        if own[-1].finish_reason is FinishReason.ABORT:
            assert tokens == usual[name][: len(tokens)]
        else:
            assert (tokens, own[-1].error) == (usual[name], None)
    assert len(outputs) == len(requests)
