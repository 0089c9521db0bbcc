"""What SmolLM2-135M says under ten schemas is valid, 200 times of 200."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from transformers import AutoTokenizer

from server.engine.config import EngineConfig
from server.engine.constraint import Constraint, ConstraintKind
from server.engine.engine import Engine
from server.engine.sequence import FinishReason, Request, SamplingParams
from tests.engine.tiny_engine import drain

TIMES = 20
MOST_TOKENS = 1200
"""More than the longest document of any schema here has, all of them being bounded: none is cut off."""


def closed(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def text(most: int) -> dict[str, Any]:
    return {"type": "string", "maxLength": most}


COUNT = {"type": "integer", "minimum": 0, "maximum": 1000}
TREE = {
    "$defs": {"node": closed(name=text(8), left={"$ref": "#/$defs/leaf"}), "leaf": closed(value=COUNT)},
    **closed(root={"$ref": "#/$defs/node"}),
}
DEGREES = {"type": "integer", "minimum": -180, "maximum": 180}
EMAIL = {"type": "string", "pattern": "^[a-z]{1,9}@[a-z]{1,9}[.]org$"}
EXTRA = {"type": "array", "items": text(8), "maxItems": 2}
DAY = {"type": "string", "format": "date"}
YEAR = {"type": ["integer", "null"], "minimum": 0, "maximum": 9999}
ASKED = [
    (
        "Describe a person.",
        closed(name=text(20), age=COUNT, email=EMAIL),
    ),
    ("Is the sky blue?", closed(answer={"type": "boolean"}, reason=text(60))),
    ("Name three fruits.", {"type": "array", "items": text(12), "minItems": 3, "maxItems": 3}),
    ("What is the mood of: I love it!", {"enum": ["positive", "negative", "neutral"]}),
    ("Where is Paris?", closed(city=text(12), position=closed(lat=DEGREES, lon=DEGREES))),
    (
        "Order a pizza.",
        closed(["size"], size={"enum": ["s", "m", "l"]}, extra=EXTRA),
    ),
    (
        "When was the moon landing?",
        closed(day=DAY, year=YEAR),
    ),
    ("Draw a small tree.", TREE),
    ("Give a colour.", {"type": "string", "pattern": "^#[0-9a-f]{6}$"}),
    ("Pay or refund?", {"anyOf": [closed(pay=COUNT), closed(refund=COUNT, reason=text(20))]}),
]


@pytest.mark.slow
def test_valid_in_200_of_200_cases(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(smollm2))
    engine = Engine.from_config(EngineConfig(str(smollm2), device="cpu", kv_memory=1 << 30, page_memory=1 << 25))
    schemas: dict[str, Any] = {}
    for index, (question, value) in enumerate(ASKED):
        messages = [{"role": "user", "content": f"{question} Answer with JSON."}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        for time in range(TIMES):
            params = SamplingParams(
                temperature=0.25 * (time % 5),
                seed=100 * index + time,
                max_tokens=MOST_TOKENS,
                constraint=Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(value)),
            )
            schemas[f"{index} {time}"] = value
            engine.add_request(Request(f"{index} {time}", tuple(prompt), params))
    outputs = drain(engine)
    engine.close()
    assert len(schemas) == 200
    assert [name for name in schemas if outputs[name][-1].finish_reason is not FinishReason.STOP] == []
    for name, value in schemas.items():
        said = tokenizer.decode([token for output in outputs[name] for token in output.tokens])
        jsonschema.validate(json.loads(said), value)
