"""Answers that have to be calls, or may be: what the grammar takes, and what comes out where anything is said in it."""

import json
import random
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest
from byte_tokenizer import byte_level_tokenizer
from pydantic import BaseModel, Field
from spoken import read
from tokenizers import Tokenizer

from server.engine.constraint import Constraint, ConstraintKind
from server.engine.grammar import Grammar, GrammarCompiler, GrammarError
from server.tools.definition import Tool, ToolUse
from server.tools.forced import answer_or_calls, forced_calls
from server.tools.form import FORMS, HERMES, LLAMA, ToolForm

MARKERS = ["<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]"]
Json = dict[str, Any]


class Item(BaseModel):
    sku: str = Field(max_length=4, description='a "quoted" ::= thing')
    count: int = Field(ge=0, le=9)


class Order(BaseModel):
    """An order."""

    items: list[Item] = Field(min_length=1, max_length=2)
    speed: Literal["slow", "fast"] = "slow"
    note: str | None = Field(default=None, max_length=3)


class Tree(BaseModel):
    name: Literal["leaf", "branch"]
    children: list["Tree"] = Field(default=[], max_length=1)


def one(**properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": list(properties)}


DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
ROOT = {**one(value=DIGIT), "properties": {"value": DIGIT, "next": {"$ref": "#"}}}
TOOLS: dict[str, tuple[Json, list[Json], list[Json]]] = {
    "nothing": ({"type": "object", "properties": {}}, [{}], [{"a": 1}]),
    "order": (
        Order.model_json_schema(),
        [
            {"items": [{"sku": "ab", "count": 3}]},
            {"items": [{"sku": "", "count": 0}] * 2, "speed": "fast", "note": None},
        ],
        [{}, {"items": []}, {"items": [{"sku": "abcde", "count": 1}]}, {"items": [{"sku": "a", "count": 1, "x": 1}]}],
    ),
    "tree": (
        Tree.model_json_schema(),
        [{"name": "leaf"}, {"name": "branch", "children": [{"name": "leaf", "children": []}]}],
        [{"name": "root"}, {"name": "leaf", "children": [{}]}],
    ),
    "itself": (ROOT, [{"value": 1}, {"value": 1, "next": {"value": 2, "next": {"value": 3}}}], [{"next": {}}]),
    "keywords": (
        one(**dict.fromkeys(("$ref", "$id", "title", "default", "allOf", "properties", "items"), DIGIT)),
        [dict.fromkeys(("$ref", "$id", "title", "default", "allOf", "properties", "items"), 1)],
        [{"$ref": 1}],
    ),
    "free": ({"type": "object"}, [{}, {"a": [1, {"b": "c"}]}], []),
    "more": ({**one(a=DIGIT), "additionalProperties": {"type": "null"}}, [{"a": 1, "b": None}], [{"a": 1, "b": 2}]),
    "named": ({**one(a=DIGIT), "additionalProperties": False}, [{"a": 1}], [{"a": 1, "b": None}]),
    "both": ({"type": "object", "allOf": [one(a=DIGIT), one(b=DIGIT)]}, [{"a": 1, "b": 2}], [{"a": 1}]),
    "either": ({"type": "object", "anyOf": [one(a=DIGIT), one(b=DIGIT)]}, [{"a": 1}, {"b": 2}], [{}]),
    "values": (
        one(unit={"enum": ["°C", "°F", None]}, mode={"const": {"$ref": "#/x"}}),
        [{"unit": "°C", "mode": {"$ref": "#/x"}}, {"unit": None, "mode": {"$ref": "#/x"}}],
        [{"unit": "K", "mode": {"$ref": "#/x"}}],
    ),
    "pairs": (one(p={"type": "array", "prefixItems": [DIGIT], "items": False}), [{"p": [1]}], [{"p": ["a"]}]),
    "explained": (
        {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "https://x/y", "title": "t", **one(a=DIGIT)},
        [{"a": 1}],
        [{}],
    ),
}


def tool(name: str) -> Tool:
    return Tool(name, f"Does {name}.", TOOLS[name][0])


def use(*names: str, **options: Any) -> ToolUse:
    return ToolUse(tuple(map(tool, names)), names, is_forced=True, **options)


@pytest.fixture(scope="module", params=[False, True], ids=["text", "special"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Markers are text of usual tokens, or special ones."""
    made: Tokenizer = byte_level_tokenizer(more_special=MARKERS if request.param else []).backend_tokenizer
    made.post_processor = None
    return made


class World:
    """Compiles, asks a grammar for a text, and lets it speak."""

    def __init__(self, tokenizer: Tokenizer, folder: Path) -> None:
        tokenizer.save(str(folder / "tokenizer.json"))
        self.tokenizer = tokenizer
        self.eos = tokenizer.token_to_id("<|im_end|>")
        self._compiler = GrammarCompiler(folder, tokenizer.get_vocab_size(), [self.eos])

    def tokens(self, form: ToolForm) -> dict[str, int]:
        found = {marker: self.tokenizer.token_to_id(marker) for marker in form.markers}
        return {marker: token for marker, token in found.items() if token is not None and marker in MARKERS}

    def compile(self, constraint: Constraint) -> Grammar:
        return self._compiler.compile(constraint)

    def takes(self, grammar: Grammar, text: str) -> bool:
        matching = grammar.start()
        for token in self.tokenizer.encode(text).ids:
            if token not in matching.allowed():
                return False
            matching.advance(token)
        return self.eos in matching.allowed()

    def speak(self, grammar: Grammar, seed: int, most: int = 2000) -> str:
        """Any text of the grammar, each token drawn evenly of those that are allowed."""
        matching, draw, said = grammar.start(), random.Random(seed), list[int]()
        for _ in range(most):
            assert matching.error is None
            token = int(draw.choice(matching.allowed()))
            if token == self.eos:
                return self.tokenizer.decode(said, skip_special_tokens=False)
            said.append(token)
            matching.advance(token)
        pytest.fail(f"no end: {self.tokenizer.decode(said[:50])!r}")


@pytest.fixture(scope="module")
def world(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tokenizer, tmp_path_factory.mktemp("vocabulary"))


def called(form: ToolForm, name: str, arguments: object) -> str:
    return json.dumps({"name": name, form.key: arguments}, ensure_ascii=False)


@pytest.mark.parametrize("name", TOOLS)
def test_valid_arguments_and_no_others(world: World, name: str) -> None:
    schema, good, bad = TOOLS[name]
    for form in FORMS.values():
        grammar = world.compile(forced_calls(use(name), form, world.tokens(form)))
        for arguments in good:
            jsonschema.validate(arguments, schema)
            assert world.takes(grammar, called(form, name, arguments)), arguments
        for arguments in bad:
            assert not world.takes(grammar, called(form, name, arguments)), arguments
        assert not world.takes(grammar, called(form, "other", good[0]))
        assert not world.takes(grammar, "Hello")
        assert not world.takes(grammar, "")


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_whatever_is_said_is_calls(world: World, form: ToolForm) -> None:
    names = [
        name for name in TOOLS if name not in ("free", "more", "both", "either", "keywords")
    ]  # with more properties
    grammar = world.compile(forced_calls(use(*names), form, world.tokens(form)))
    counts, seen = set(), set()
    for seed in range(40):
        spoken = read(form, [form.beginning, world.speak(grammar, seed)], names=names)
        assert spoken.content == ""
        counts.add(len(spoken.calls))
        for name, arguments in spoken.calls:
            seen.add(name)
            jsonschema.validate(json.loads(arguments), TOOLS[name][0])
    assert len(seen) > 5
    assert counts == {1} if form.has_one_call else max(counts) > 1


LOOSE = one(
    digits={"type": "array", "items": DIGIT, "uniqueItems": True, "maxItems": 2},
    size={"type": "string", "format": "int32", "maxLength": 3, "not": {"const": "no"}},
    which={"oneOf": [DIGIT, {"type": "integer", "minimum": 5, "maximum": 12}]},
    uniqueItems={"type": "object", "properties": {}, "minProperties": 0},
)


def test_what_a_grammar_cannot_keep_is_left_out_or_refused(world: World) -> None:
    loose, strict = Tool("f", None, LOOSE), Tool("f", None, LOOSE, strict=True)
    grammar = world.compile(forced_calls(ToolUse((loose,), ("f",), is_forced=True), HERMES, {}))
    good = {"digits": [1, 1], "size": "no", "which": 12, "uniqueItems": {}}
    assert world.takes(grammar, called(HERMES, "f", good))
    for bad in ({"digits": [1, 1, 1]}, {"size": "four"}, {"which": 13}, {"which": None}):
        assert not world.takes(grammar, called(HERMES, "f", {**good, **bad}))
    with pytest.raises(GrammarError):
        world.compile(forced_calls(ToolUse((strict,), ("f",), is_forced=True), HERMES, {}))


def test_one_call_and_the_allowed_tools(world: World) -> None:
    single = world.compile(forced_calls(use("nothing", is_parallel=False), HERMES, world.tokens(HERMES)))
    several = world.compile(forced_calls(use("nothing"), HERMES, world.tokens(HERMES)))
    call = called(HERMES, "nothing", {})
    assert world.takes(single, call)
    assert not world.takes(single, call + HERMES.between + call)
    assert world.takes(several, HERMES.between.join([call] * 8))
    assert not world.takes(several, HERMES.between.join([call] * 9))
    narrow = ToolUse((tool("nothing"), tool("tree")), ("tree",), is_forced=True)
    grammar = world.compile(forced_calls(narrow, HERMES, world.tokens(HERMES)))
    assert not world.takes(grammar, call)
    assert world.takes(grammar, called(HERMES, "tree", {"name": "leaf"}))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_an_answer_of_a_schema_or_calls(world: World, form: ToolForm) -> None:
    schema = json.dumps(one(answer=DIGIT))
    for kind, source in ((ConstraintKind.JSON_SCHEMA, schema), (ConstraintKind.JSON_OBJECT, "")):
        answer = Constraint(kind, source, param="response_format")
        constraint = answer_or_calls(answer, use("nothing", "tree"), form, world.tokens(form))
        assert constraint.param == "response_format"
        grammar = world.compile(constraint)
        assert world.takes(grammar, '{"answer": 4}')
        assert world.takes(grammar, form.write("tree", {"name": "leaf"}))
        assert world.takes(grammar, '{"b": 4}') == (kind is ConstraintKind.JSON_OBJECT)
        assert not world.takes(grammar, "Hello")
        assert not world.takes(grammar, "")


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        (ConstraintKind.REGEX, "a+"),
        (ConstraintKind.CHOICE, '["a"]'),
        (ConstraintKind.GRAMMAR, "start: A"),
        (ConstraintKind.JSON_SCHEMA, "true"),
        (ConstraintKind.JSON_SCHEMA, "[1]"),
        (ConstraintKind.JSON_SCHEMA, "{"),
        (ConstraintKind.JSON_SCHEMA, "[" * 100_000),
    ],
)
def test_answers_that_calls_cannot_be_told_from_stay_alone(kind: ConstraintKind, source: str) -> None:
    answer = Constraint(kind, source)
    assert answer_or_calls(answer, use("nothing"), LLAMA, {}) is answer


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}},
        {"type": "object", "properties": {"a": {"$ref": "https://elsewhere/schema"}}},
        {"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}},
        {"type": "object", "properties": {"a": {"type": "wizard"}}},
        {"type": "object", "properties": {"a": {"$ref": 5}}},
        {"type": "object", "properties": {"a": 5}},
        {"type": "object", "properties": {"a": {"enum": []}}, "required": ["a"]},
        {"type": "object", "properties": {"a": {"allOf": 7}}},
        {"type": "object", "properties": {"a": {"oneOf": 7, "format": {}}}},
    ],
)
def test_schemas_that_are_none_are_refused(world: World, parameters: Json) -> None:
    forced = ToolUse((Tool("f", None, parameters),), ("f",), is_forced=True)
    with pytest.raises(GrammarError) as refused:
        world.compile(forced_calls(forced, HERMES, {}))
    assert "call:" not in str(refused.value)  # the grammar around the schema is nobody's business
