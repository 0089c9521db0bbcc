"""Constraints that the grammar library fails at: each ends its own requests, and the threads go on."""

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from server.engine.config import EngineConfig
from server.engine.constraint import Constraint
from server.engine.engine import Engine
from server.engine.grammar import GrammarError, grammar_text
from server.engine.grammar_bank import COMPILERS
from server.engine.grammar_check import SMALL_SOURCE, CheckedCompiler
from server.engine.sequence import FinishReason, Output, Request
from tests.engine.constrained_requests import CHOICE, CHOICES, GREEDY, constrained, text_of
from tests.engine.constraints import regex
from tests.engine.delayed_steps import CPU
from tests.engine.tiny_engine import PROMPTS, tokens_of
from tests.panic import Panic

MARK = "!panics!"
"""What a constraint says that the library panics at."""

PLANTED = f"""
import sys
from server.engine import grammar_check

class Panic(BaseException):
    pass

class Compiler(grammar_check.GrammarCompiler):
    def compile(self, constraint):
        if {MARK!r} in constraint.source:
            raise Panic("at a rule")
        return super().compile(constraint)

grammar_check.GrammarCompiler = Compiler
sys.exit(grammar_check.main())
"""


def panicking(name: object) -> Constraint:
    return regex(f"{MARK}{name}")


@pytest.fixture
def engine(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """One whose library panics at some constraints."""

    def text(constraint: Constraint) -> str:
        if MARK in constraint.source:
            raise Panic("at a rule")
        return grammar_text(constraint)

    monkeypatch.setattr("server.engine.grammar.grammar_text", text)
    engine = Engine.from_config(EngineConfig(str(model), **CPU))  # type: ignore[arg-type]
    yield engine
    engine.close()


def run(engine: Engine, requests: list[Request]) -> dict[str, list[Output]]:
    outputs: dict[str, list[Output]] = {request.id: [] for request in requests}
    for request in requests:
        engine.add_request(request)
    deadline = time.monotonic() + 60.0
    while engine.has_work:
        assert time.monotonic() < deadline, "a request waits for ever"
        for output in engine.step():
            outputs[output.request_id].append(output)
        engine.check_integrity()
    return outputs


def test_a_panic_ends_the_request_and_nothing_else(
    engine: Engine, words: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """More of them than there are threads that compile, and one of these constraints again."""
    free = Request("free", PROMPTS[1], GREEDY)
    alone = tokens_of(run(engine, [free])["free"])
    names = [*range(2 * COMPILERS + 1), 0]
    bad = [
        Request(f"bad {number}", PROMPTS[0], constrained(GREEDY, panicking(name))) for number, name in enumerate(names)
    ]
    outputs = run(engine, [*bad, free, Request("good", PROMPTS[0], constrained(GREEDY, CHOICE))])
    for request in bad:
        (ending,) = outputs[request.id]
        assert ending.finish_reason is FinishReason.ERROR
        assert ending.error == "response_format: it cannot be compiled"
        assert (ending.error_param, ending.error_code) == ("response_format", "invalid_constraint")
    assert tokens_of(outputs["free"]) == alone
    assert text_of(outputs["good"], words) in CHOICES
    assert caplog.text.count("Panic: at a rule\n\nThe above exception was the direct cause") == 2 * COMPILERS + 1


def test_a_constraint_may_be_compiled_after_a_panic(
    engine: Engine, words: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the library was at its limits and is no longer: a refusal that is forgotten is no refusal for ever."""
    request = Request("r", PROMPTS[0], constrained(GREEDY, panicking("again")))
    assert run(engine, [request])["r"][-1].error_code == "invalid_constraint"
    monkeypatch.undo()
    assert run(engine, [request])["r"][-1].error_code == "invalid_constraint", "it is remembered"
    assert engine.arrivals.grammars is not None
    engine.arrivals.grammars.drop_idle()
    assert text_of(run(engine, [request])["r"], words) == f"{MARK}again"


def test_a_grammar_that_no_output_can_begin_with_ends_its_requests(engine: Engine, words: Tokenizer) -> None:
    class Poisoned:
        def deep_copy(self) -> None:
            raise Panic("called `Result::unwrap()` on an `Err` value: PoisonError")

    request, free = Request("r", PROMPTS[0], constrained(GREEDY, CHOICE)), Request("free", PROMPTS[1], GREEDY)
    run(engine, [request])
    bank = engine.arrivals.grammars
    assert bank is not None
    grammar = bank.get(CHOICE)
    assert grammar is not None
    bank._found[CHOICE] = replace(grammar, matchers=(Poisoned(),))  # type: ignore[arg-type]
    outputs = run(engine, [request, free])
    assert outputs["r"][-1].error == "response_format: it cannot be used (Panic)"
    assert outputs["r"][-1].error_code == "invalid_constraint"
    assert len(tokens_of(outputs["free"])) == GREEDY.max_tokens
    bank._found[CHOICE] = grammar
    assert text_of(run(engine, [request])["r"], words) in CHOICES


def test_without_threads_or_processes_a_constrained_request_ends_and_the_next_one_need_not(
    engine: Engine, words: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system may have some when it comes."""
    assert engine.arrivals.grammars is not None
    tried = regex("a" * (SMALL_SOURCE + 1))
    requests = [Request(str(one), PROMPTS[0], constrained(GREEDY, one)) for one in (CHOICE, tried)]
    free = Request("free", PROMPTS[1], GREEDY)

    def refused(*_: object, **__: object) -> None:
        raise BlockingIOError("Resource temporarily unavailable")

    with monkeypatch.context() as patch:
        patch.setattr(engine.arrivals.grammars._loader, "_stack_bytes", 1 << 50)  # no thread starts with that
        outputs = run(engine, [*requests, free])
        assert [outputs[request.id][-1].error_code for request in requests] == ["constraint_unavailable"] * 2
        assert len(tokens_of(outputs["free"])) == GREEDY.max_tokens
    with monkeypatch.context() as patch:
        patch.setattr("subprocess.Popen", refused)
        outputs = run(engine, requests)
        assert text_of(outputs[requests[0].id], words) in CHOICES
        assert outputs[requests[1].id][-1].error_code == "constraint_unavailable"
    text = text_of(run(engine, requests)[requests[1].id], words)
    assert text
    assert not text.strip("a")


def test_a_panic_in_the_other_process_is_no_lack_of_time(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And the process goes on."""
    compiler = CheckedCompiler(model, 512, {1})
    compiler._command = [sys.executable, "-c", PLANTED, *compiler._command[4:]]
    try:
        padding = "a" * SMALL_SOURCE
        for _ in range(2):
            with pytest.raises(GrammarError, match=r"^it cannot be compiled$"):
                compiler.compile(panicking(padding))
        assert compiler.compile(regex("b" + padding)).num_bytes > 0
        assert len(compiler._all) == 1
    finally:
        compiler.close()
    assert capfd.readouterr().err.count("Panic: at a rule") == 2
