"""The real model over a real socket: it was never taught to call functions, and forced calls are valid all the same."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, product
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest
from openai import OpenAI, pydantic_function_tool
from pydantic import BaseModel, Field
from served import Served

pytestmark = pytest.mark.slow
ADAPTERS = Path(__file__).parents[2] / "deploy" / "demo" / "adapters"


class Weather(BaseModel):
    """Tells the weather."""

    city: str = Field(max_length=20)
    unit: Literal["celsius", "fahrenheit"] = "celsius"


class Address(BaseModel):
    street: str = Field(max_length=20)
    number: int = Field(ge=1, le=999)


class Contact(BaseModel):
    """Saves a person's name and addresses."""

    name: str = Field(max_length=20)
    addresses: list[Address] = Field(max_length=2)
    nickname: str | None = Field(default=None, max_length=10)


class Calculation(BaseModel):
    """Computes a sum, a difference, a product or a quotient."""

    operation: Literal["add", "subtract", "multiply", "divide"]
    left: float = Field(ge=-1000, le=1000)
    right: float = Field(ge=-1000, le=1000)


TOOLS = [
    pydantic_function_tool(Weather, name="get_weather"),
    pydantic_function_tool(Contact, name="save_contact"),
    pydantic_function_tool(Calculation, name="calculate"),
    {"type": "function", "function": {"name": "get_time", "description": "Tells the time."}},
    {
        "type": "function",
        "function": {
            "name": "set_lights",
            "parameters": {
                "type": "object",
                "properties": {"rooms": {"type": "array", "items": {"enum": ["bath", "kitchen"]}, "maxItems": 2}},
                "required": ["rooms"],
            },
        },
    },
]
SCHEMAS = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in TOOLS}
QUESTIONS = [
    "What is the weather in Rome?",
    "Save Emma Stone, Main Street 5.",
    "How much is 17 times 23?",
    "What time is it?",
    "Light in the kitchen, please.",
    "Tell me a story.",
]
MODELS = ["smollm2-135m", "pirate", "json_fields"]


@pytest.fixture(scope="module")
def client(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    served = Served(
        smollm2, tmp_path_factory.mktemp("data"), "--adapters", str(ADAPTERS), "--max-model-len", "2048",
        "--served-name", "smollm2-135m", "--kv-memory", "256MiB", "--page-memory", "128MiB",
    )  # fmt: skip
    with OpenAI(base_url=served.base_url, api_key="none", max_retries=0, timeout=300) as client:
        yield client
    assert served.stop() == 0


def ask(client: OpenAI, question: str, model: str, **options: Any) -> list[tuple[str, Any]]:
    """The calls of an answer that has nothing else."""
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], tools=TOOLS, max_tokens=1000, **options
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls", choice
    assert choice.message.content is None
    return [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls or ()]


def test_named_functions(client: OpenAI) -> None:
    """Each in several ways, all at once: rows of a batch have grammars of their own."""
    asked = list(product(SCHEMAS, QUESTIONS[:2], MODELS))

    def call(name: str, question: str, model: str) -> list[tuple[str, Any]]:
        choice = {"type": "function", "function": {"name": name}}
        return ask(client, question, model, tool_choice=choice, temperature=0, parallel_tool_calls=False)

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda each: call(*each), asked))
    assert [[name for name, _ in calls] for calls in answers] == [[name] for name, _, _ in asked]
    for ((name, arguments),) in answers:
        jsonschema.validate(arguments, SCHEMAS[name])


def test_any_function(client: OpenAI) -> None:
    def call(each: tuple[str, str]) -> list[tuple[str, Any]]:
        question, model = each
        forced: dict[str, Any] = {"tool_choice": "required", "parallel_tool_calls": False}
        return ask(client, question, model, seed=len(question), temperature=0.7, **forced)

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(call, product(QUESTIONS, MODELS)))
    for ((name, arguments),) in answers:
        jsonschema.validate(arguments, SCHEMAS[name])


def test_several_calls(client: OpenAI) -> None:
    """It does not know when to end, so it makes as many calls as it may; all of them are valid."""
    with ThreadPoolExecutor(3) as threads:
        answers = list(
            threads.map(
                lambda seed: ask(client, QUESTIONS[seed], MODELS[0], tool_choice="required", seed=seed), range(3)
            )
        )
    assert max(map(len, answers)) > 1
    for name, arguments in chain.from_iterable(answers):
        jsonschema.validate(arguments, SCHEMAS[name])


def test_streams_say_the_same(client: OpenAI) -> None:
    asked: dict[str, Any] = {"tool_choice": "required", "seed": 5, "temperature": 0.7, "parallel_tool_calls": False}
    whole = ask(client, QUESTIONS[1], "smollm2-135m", **asked)
    messages = [{"role": "user", "content": QUESTIONS[1]}]
    with client.chat.completions.stream(
        model="smollm2-135m", messages=messages, tools=TOOLS, max_tokens=300, **asked
    ) as stream:
        for _ in stream:
            pass
        calls = stream.get_final_completion().choices[0].message.tool_calls or []
    assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == whole
