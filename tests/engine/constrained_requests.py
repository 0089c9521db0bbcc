"""Requests under every kind of constraint, and whether their texts are of its language."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

import jsonschema
from tokenizers import Tokenizer

from server.engine.constraint import Constraint, ConstraintKind
from server.engine.engine import Engine
from server.engine.masks import MaskThreads, shared_out
from server.engine.matching import Matching
from server.engine.sequence import Output, Request, SamplingParams
from tests.engine.tiny_engine import PROMPTS

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
REGEX = Constraint(ConstraintKind.REGEX, r"[a-c]{2,9}-[0-9]{1,5}(\.[0-9]{2})?!")
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


def compile_all(engine: Engine, requests: Iterable[Request]) -> None:
    """Their grammars are there before they come: no thread decides which of them run side by side."""
    bank, wanted = engine.arrivals.grammars, {request.params.constraint for request in requests} - {None}
    assert bank is not None
    for constraint in wanted:
        bank.enter(constraint)
    while bank.compiling:
        bank.wait(60.0)
        bank.poll()
    for constraint in wanted:
        bank.leave(constraint)


class LazyMasks(MaskThreads):
    """Computes masks in the engine's own thread, and only when a step has waited for them `patience` times in vain."""

    def __init__(self, patience: int) -> None:
        super().__init__(1)
        self.patience = patience
        self.vain = 0
        self.moves: list[tuple[Matching, int]] = []

    def advance(self, moves: Sequence[tuple[Matching, int]]) -> None:
        for own, _ in moves:
            own.pending = True
        self.moves += moves

    def wait(self, *_: object) -> None:
        self.vain += 1
        if self.vain > self.patience:
            self._run(shared_out(self.moves))
            self.vain, self.moves = 0, []

    outwait = wait
