"""What constraints cost a decode step: rows under a grammar beside as many free ones.

The tokenizer has as many tokens as the model, made of random words and signs: no file is needed. The grammars never
end, so that every step has all rows; what is generated is noise that keeps to them.
"""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from server.engine.bench_measure import BenchError, percentile
from server.engine.bench_scenarios import add_loss
from server.engine.bench_session import Session, Setup
from server.engine.constraint import Constraint, ConstraintKind
from server.engine.engine import Engine
from server.engine.grammar import Grammar
from server.engine.sequence import Request
from server.engine.workload import Lengths, Traffic

Json = dict[str, Any]

RECORDS = {
    "type": "array",
    "minItems": 1_000_000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "kind": {"enum": ["person", "place", "thing"]},
            "count": {"type": "integer"},
            "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{2,12}$"}, "maxItems": 4},
        },
        "required": ["name", "kind", "count", "tags"],
        "additionalProperties": False,
    },
}
OPEN_RECORDS = {
    "type": "array",
    "minItems": 1_000_000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "kind": {"enum": ["person", "place", "thing"]},
            "count": {"type": "integer"},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["name", "kind", "count", "tags"],
        "additionalProperties": False,
    },
}
"""Without lengths and patterns, as most schemas are: a mask within a string is the same for all of its tokens."""

GRAMMARS = {
    "0": None,
    "open_schema": Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(OPEN_RECORDS)),
    "json_schema": Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(RECORDS)),
    "regex": Constraint(ConstraintKind.REGEX, r"([A-Za-z0-9 ,;]{1,200}[.!?]\n){1000000}"),
}
OUTPUTS, OUTPUT_TOKENS = 16, 100
"""Whose masks are timed alone."""
PRINTABLE = [chr(code) for code in range(0x21, 0x7F)] + ["\u0120", "\u010a"]  # byte-level BPE's space and new line


def grammar(session: Session) -> Json:
    """Milliseconds of a decode step by rows and grammar, and microseconds of computing a mask."""
    write_tokenizer(session.folder, session.shape.vocab_size, session.options.seed)
    results = []
    for count in session.options.rows:
        rows = [_decode(session, name, constraint, count) for name, constraint in GRAMMARS.items()]
        add_loss(rows, "ms", higher=False)
        results += rows
    return {"scenario": "grammar", "steps": session.options.steps, "rows": results}


def _decode(session: Session, name: str, constraint: Constraint | None, count: int) -> Json:
    options = session.options
    engine = session.engine(Setup(max(count, options.concurrency), session.most_adapters))
    prompt = max(1, options.context - options.warm - options.steps // 2)
    plain = session.workload(f"grammar-{count}-{name}", Traffic.parse("0"), _lengths(session, count, prompt))
    requests = tuple(
        replace(request, params=replace(request.params, constraint=constraint)) for request in plain.requests
    )
    seconds, tokens = measure(engine, requests, warm=options.warm, steps=options.steps, clock=session.clock)
    bank = engine.arrivals.grammars
    compiled = None if constraint is None or bank is None else bank.get(constraint)
    masks = [] if compiled is None else mask_seconds(compiled, options.seed)
    ms = sum(seconds) * count / tokens * 1e3
    session.say(f"grammar {name}, {count} rows: {ms:.3f} ms for a token of each")
    return {
        "rows": count,
        "traffic": name,
        "ms": ms,
        "ms_p10": percentile(seconds, 10) * 1e3,
        "ms_p90": percentile(seconds, 90) * 1e3,
        "late": 1 - tokens / (count * len(seconds)),
        "mask_us": percentile(masks, 50) * 1e6 if masks else None,
        "mask_us_mean": sum(masks) / len(masks) * 1e6 if masks else None,
    }


def measure(
    engine: Engine, requests: Iterable[Request], *, warm: int, steps: int, clock: Callable[[], float]
) -> tuple[list[float], int]:
    """Seconds of `steps` steps after `warm` others in which all requests decode, and the tokens that they gave: of more
    steps if they gave none.

    A row whose mask is late gives none in its step, so that tokens are counted and not steps. Raises BenchError if a
    request ends meanwhile.
    """
    waiting = {request.id for request in requests}
    names = tuple(waiting)
    for request in requests:
        engine.add_request(request)
    while waiting:
        waiting -= {output.request_id for output in engine.step() if output.tokens}
    for _ in range(warm):
        engine.step()
    seconds: list[float] = []
    tokens = 0
    while len(seconds) < steps or not tokens:
        started = clock()
        outputs = engine.step()
        seconds.append(clock() - started)
        tokens += sum(len(output.tokens) for output in outputs)
        if ended := [output for output in outputs if output.finish_reason is not None]:
            raise BenchError(f"{ended[0].request_id} ended: {ended[0].error or ended[0].finish_reason}")
    for name in names:
        engine.abort(name)
    while engine.has_work:
        engine.step()
    return seconds, tokens


def _lengths(session: Session, count: int, prompt: int) -> Lengths:
    return Lengths.constant(count, prompt, session.longest - prompt)


def mask_seconds(grammar: Grammar, seed: int) -> list[float]:
    """CPU seconds of masks, one at a time, behind random tokens that the one before allows."""
    rng, seconds = np.random.default_rng([seed, 3]), []
    for _ in range(OUTPUTS):
        matching = grammar.start()
        for _ in range(OUTPUT_TOKENS):
            token = int(rng.choice(matching.allowed()))
            started = time.thread_time()
            matching.advance(token)
            seconds.append(time.thread_time() - started)
    return seconds


def write_tokenizer(folder: Path, vocab_size: int, seed: int) -> None:
    """tokenizer.json of a byte-level vocabulary of random words, half of them behind a space; id 1 ends the text."""
    rng = np.random.default_rng([seed, 2])
    letters = list("etaoinshrdlcumwfgypbvkjxqz")
    likely = 1 / np.arange(2, len(letters) + 2)
    vocabulary = dict.fromkeys(["<s>", "</s>", *PRINTABLE])
    while len(vocabulary) < vocab_size:
        length = int(rng.integers(2, 11))
        pool, weights = (PRINTABLE[:-2], None) if rng.random() < 0.1 else (letters, likely / likely.sum())
        word = "".join(rng.choice(pool, length, p=weights))
        vocabulary["\u0120" * int(rng.random() < 0.5) + word] = None
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": text, **special} for index, text in enumerate(["<s>", "</s>"])],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {text: index for index, text in enumerate(vocabulary)}, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
