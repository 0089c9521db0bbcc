"""Constraints compiled for a vocabulary: what is kept, and what is refused with a reason."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer

from server.engine.constraint import LONGEST_SOURCE, Constraint, ConstraintKind
from server.engine.grammar import STACK_BYTES, Grammar, GrammarCompiler, GrammarError
from server.engine.grammar_check import SMALL_SOURCE, CheckedCompiler
from tests.engine.constraints import lark, regex, schema

EOS = 1
VOCABULARY = 512


@pytest.fixture(scope="module")
def compiler(model: Path) -> GrammarCompiler:
    return GrammarCompiler(model, VOCABULARY, {EOS})


@pytest.fixture(scope="module")
def checked(model: Path) -> Iterator[CheckedCompiler]:
    compiler = CheckedCompiler(model, VOCABULARY, {EOS}, seconds=0.5)
    yield compiler
    compiler.close()


def compile_deep(compiler: GrammarCompiler | CheckedCompiler, constraint: Constraint) -> Grammar:
    """In a thread with the stack that compiling needs."""
    found: list[Grammar | GrammarError] = []

    def work() -> None:
        try:
            found.append(compiler.compile(constraint))
        except GrammarError as error:
            found.append(error)

    usual = threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=work)
    thread.start()
    threading.stack_size(usual)
    thread.join()
    if isinstance(found[0], GrammarError):
        raise found[0]
    return found[0]


def accepts(grammar: Grammar, text: str, words: Tokenizer) -> bool:
    """Whether the masks allow the text's tokens one after the other, and then the end."""
    matching = grammar.start()
    for token in words.encode(text).ids:
        if token not in matching.allowed():
            return False
        matching.advance(token)
        assert matching.error is None
    return EOS in matching.allowed()


def test_what_takes_long_to_compile_is_compiled_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(model, VOCABULARY, {EOS}, copies=3)
    several = compiler.compile(regex("a+"))
    monkeypatch.setattr("server.engine.grammar.COPY_SECONDS", 0.0)
    one = compiler.compile(regex("a+"))
    assert (len(several.matchers), len(one.matchers)) == (3, 1)
    assert several.num_bytes == 3 * one.num_bytes


def test_reading_the_tokenizer_is_no_part_of_compiling(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first grammar of an engine has copies too, though its tokenizer takes half a second."""
    compiler, now = GrammarCompiler(model, VOCABULARY, {EOS}, copies=3), 0.0
    load = compiler.load

    def slow_load() -> Any:
        nonlocal now
        now += 0.5
        return load()

    monkeypatch.setattr(compiler, "load", slow_load)
    monkeypatch.setattr("server.engine.grammar.time", SimpleNamespace(thread_time=lambda: now))
    assert len(compiler.compile(regex("a+")).matchers) == 3


@pytest.mark.parametrize(
    ("constraint", "good", "bad"),
    [
        (Constraint(ConstraintKind.JSON_OBJECT), ['{"a": [1, {}]}', "{}"], ["[]", "{", '"a"', '{"a": 1} ']),
        (schema({"type": "integer", "multipleOf": 3}), ["9", "-12"], ["10", "9.5"]),
        (schema({"type": "string", "format": "date"}), ['"2024-02-28"'], ['"2024-13-28"', '"x"']),
        (schema(True), ["null", "[1,2]", '{"a":{}}'], ["nul", ""]),
        (regex("a|bc"), ["a", "bc"], ["b", "abc", ""]),
        (regex("^a+$"), ["aaa"], ["b"]),
        (regex(""), [""], ["a"]),
        (
            Constraint(ConstraintKind.CHOICE, json.dumps(["a b", 'q"\\\n', "", "é漢"])),
            ["a b", 'q"\\\n', "", "é漢"],
            ["a"],
        ),
        (lark('start: "x" y\ny: /[0-9]/ | "(" y ")"'), ["x1", "x((2))"], ["x", "x(1", "x1)"]),
        (lark('root ::= "x" y\ny ::= [0-9] | "(" y ")"'), ["x1", "x((2))"], ["x", "x(1", "x1)"]),
        (
            schema({"$ref": "#/$defs/n", "$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}}),
            ["[[],[[]]]"],
            ["[1]"],
        ),
    ],
)
def test_exactly_the_texts_of_the_language(
    compiler: GrammarCompiler, words: Tokenizer, constraint: Constraint, good: list[str], bad: list[str]
) -> None:
    grammar = compiler.compile(constraint)
    assert [text for text in good if not accepts(grammar, text, words)] == []
    assert [text for text in bad if accepts(grammar, text, words)] == []


def test_white_space_is_bounded(compiler: GrammarCompiler, words: Tokenizer) -> None:
    grammar = compiler.compile(schema({"type": "array", "items": {"type": "integer"}}))
    for text in ("[1,2]", "[1, 2]", "[\n    1,\n    2\n]"):
        assert accepts(grammar, text, words)
    for text in ("[1,  2]", "[\n\n1]", "[\t1]", "[\n" + " " * 33 + "1]"):
        assert not accepts(grammar, text, words)


REFUSED = [
    (schema({"not": {"type": "null"}}), "not"),
    (schema({"type": "object", "if": {}, "then": {}}), "if"),
    (schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
    (schema({"type": "array", "contains": {}}), "contains"),
    (schema({"x-guidance": {"lenient": True}, "not": {}}), "not"),
    (lark('start: %json {"x-guidance": {"lenient": true}, "not": {}}'), "not"),
    (schema({"oneOf": [{"type": "number"}, {"type": "integer"}]}), "oneOf"),
    (schema({"type": "string", "format": "klingon"}), "format"),
    (schema({"type": "string", "pattern": "(?=a)b"}), "look-around"),
    (schema({"$ref": "http://127.0.0.1:9/a.json"}), "not present"),
    (schema({"$ref": "file:///etc/passwd"}), "not present"),
    (schema({"$ref": "#/nowhere"}), "does not exist"),
    (schema({"type": "integer", "minimum": 3, "maximum": 2}), "minimum"),
    (schema({"enum": []}), "empty"),
    (schema({"$ref": "#"}), "no document that ends"),
    (schema({"type": "wrong"}), "wrong"),
    (schema(False), "false"),
    (schema([]), "object"),
    (Constraint(ConstraintKind.JSON_SCHEMA, "{"), "property name"),
    (Constraint(ConstraintKind.JSON_SCHEMA, "[" * 100_000), "deeply"),
    (regex("("), "unclosed"),
    (regex("(?=a)b"), "look-around"),
    (regex(r"(a)\1"), "backreference"),
    (regex(r"[^\x00-\U0010ffff]"), "no text"),
    (regex("((a{1000}){1000}){1000}"), "too complex"),
    (regex("(" * 60_000 + "a" + ")" * 60_000), "regex"),
    (regex("a" * (LONGEST_SOURCE + 1)), "at most"),
    (Constraint(ConstraintKind.CHOICE, "[]"), "not empty"),
    (Constraint(ConstraintKind.CHOICE, "[1]"), "texts"),
    (lark(""), "Empty"),
    (lark('foo: "a"'), "no start rule"),
    (lark('foo ::= "a"'), "root"),
    (lark("start: foo"), "unknown name"),
    (lark("start: start"), "no text"),
    (lark('start: "a" start'), "impossible"),
    (lark("start: " + "(" * 60_000), "nested"),
    (lark("root ::= " + "(" * 5_000), "deeply"),
]


@pytest.mark.parametrize(("constraint", "reason"), REFUSED)
def test_what_cannot_be_kept_is_refused_in_a_sentence(
    compiler: GrammarCompiler, constraint: Constraint, reason: str
) -> None:
    with pytest.raises(GrammarError, match=re.escape(reason)) as refused:
        compiler.compile(constraint)
    assert len(str(refused.value)) < 300
    assert "\n" not in str(refused.value)


def chain(length: int, link: Any) -> Constraint:
    definitions = {f"d{index}": link(f"#/$defs/d{index + 1}") for index in range(length)}
    return schema({"$defs": {**definitions, f"d{length}": {"type": "string"}}, "$ref": "#/$defs/d0"})


@pytest.mark.parametrize(
    "constraint",
    [
        chain(1500, lambda target: {"properties": {"a": {"$ref": target}}}),
        chain(3500, lambda target: {"$ref": target}),
        lark("start: r0\n" + "\n".join(f"r{index}: r{index + 1}" for index in range(6000)) + '\nr6000: "a"'),
        lark("start: T0\n" + "\n".join(f"T{index}: T{index + 1}" for index in range(6000)) + '\nT6000: "a"'),
    ],
    ids=["properties", "references", "rules", "terminals"],
)
def test_long_chains_overflow_no_stack(compiler: GrammarCompiler, constraint: Constraint) -> None:
    """Each of them ends a process whose thread has eight megabytes."""
    assert SMALL_SOURCE < len(constraint.source) <= LONGEST_SOURCE
    compile_deep(compiler, constraint).start().advance(65)


ENDLESS = [
    schema({"patternProperties": {f"^p{index}x": {} for index in range(700)}}),
    lark("\n".join(f"start{index or ''}: start{index + 1}" for index in range(2500))),
    schema({"multipleOf": 10_000_019}),
    Constraint(ConstraintKind.JSON_SCHEMA, '{"multiple\\u004ff": 10000019}'),
    lark('start: %json {"multipleOf": 10000019}'),
]


@pytest.mark.parametrize(
    "constraint", ENDLESS, ids=["patternProperties", "an error below a chain", "multiples", "spelled otherwise", "Lark"]
)
def test_what_takes_too_long_is_refused_and_the_next_one_is_not(
    checked: CheckedCompiler, constraint: Constraint
) -> None:
    with pytest.raises(GrammarError, match=r"0\.5 seconds were not enough"):
        checked.compile(constraint)
    big = schema({"enum": [f"value {index}" for index in range(200)]})
    assert len(big.source) > SMALL_SOURCE
    assert checked.compile(big).num_bytes > 0


def test_the_other_process_gives_the_reason(checked: CheckedCompiler) -> None:
    with pytest.raises(GrammarError, match="uniqueItems"):
        checked.compile(schema({"uniqueItems": True, "description": "x" * SMALL_SOURCE}))


def test_a_process_that_was_killed_is_replaced(checked: CheckedCompiler) -> None:
    big = regex("a" * (SMALL_SOURCE + 1))
    checked.compile(big)
    for process in checked._all:
        process.kill()
    with pytest.raises(GrammarError):
        checked.compile(big)
    assert checked.compile(big).num_bytes > 0


def test_a_folder_without_a_tokenizer_cannot_constrain(tiny_model: Path) -> None:
    with pytest.raises(GrammarError, match="tokenizer cannot constrain"):
        GrammarCompiler(tiny_model, VOCABULARY, {EOS}).compile(regex("a"))


def test_the_engine_runs_without_the_library(tiny_model: Path) -> None:
    """Only a constrained request needs it, and says so."""
    program = f"""
import sys
sys.modules["llguidance"] = None
from server.engine.config import EngineConfig
from server.engine.constraint import Constraint, ConstraintKind
from server.engine.engine import Engine
from server.engine.sequence import Request, SamplingParams
engine = Engine.from_config(EngineConfig({str(tiny_model)!r}, device="cpu", kv_memory=1 << 22, page_memory=1 << 20))
engine.add_request(Request("free", (5,), SamplingParams(max_tokens=2, ignore_eos=True)))
engine.add_request(Request("r", (5,), SamplingParams(constraint=Constraint(ConstraintKind.JSON_OBJECT))))
while engine.has_work:
    for output in engine.step():
        if output.finish_reason:
            print(output.request_id, output.finish_reason, output.error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert sorted(done.stdout.splitlines()) == [
        "free length None",
        "r error response_format: this server has no grammar library (llguidance)",
    ]
