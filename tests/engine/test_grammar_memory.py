"""What compiled grammars count for, beside the memory that they hold."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from server.engine import grammar_check
from server.engine.allocated import allocated_bytes
from server.engine.grammar import GrammarCompiler, GrammarError
from server.engine.grammar_check import CheckedCompiler
from tests.engine.constraints import schema

tells = pytest.mark.skipif(not allocated_bytes(), reason="the C library does not tell what was allocated")

MEASURE = """
import sys, threading
from pathlib import Path
from server.engine.grammar import STACK_BYTES
from server.engine.grammar_check import CheckedCompiler
from tests.engine.constraints import schema

def resident():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return 1024 * int(line.split()[1])

def measure():
    compiler = CheckedCompiler(Path(sys.argv[1]), 512, {1}, seconds=60.0)
    grammars = [compiler.compile(schema({"multipleOf": 3}))]
    before = resident()
    grammars += [compiler.compile(schema({"multipleOf": number})) for number in (40_009, 40_013, 40_031, 40_037)]
    print(resident() - before, sum(grammar.num_bytes for grammar in grammars[1:]))
    compiler.close()

threading.stack_size(STACK_BYTES)
thread = threading.Thread(target=measure)
thread.start()
thread.join()
"""


@tells
def test_what_large_multiples_count_for_is_what_they_hold(model: Path) -> None:
    """As the process sees its memory grow. Each was tried in the same other process, whose memory was there already."""
    told = subprocess.run(
        [sys.executable, "-c", MEASURE, str(model)], check=True, capture_output=True, text=True, timeout=120
    )
    grown, counted = map(int, told.stdout.split())
    assert grown > 1 << 24
    assert 0.5 < counted / grown < 2


@tells
def test_a_large_grammar_does_not_count_for_the_next_one(model: Path) -> None:
    compiler = CheckedCompiler(model, 512, {1}, seconds=60.0)
    try:
        small = [compiler.compile(schema({"multipleOf": number})).num_bytes for number in (3, 40_009, 5)]
        assert small[0] < 1 << 20 < small[1]
        assert small[2] < 1 << 20
        assert len(compiler._all) == 1
    finally:
        compiler.close()


@tells
def test_what_would_hold_too_much_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_check, "MOST_BYTES", 1 << 22)
    compiler = CheckedCompiler(model, 512, {1}, seconds=60.0)
    try:
        with pytest.raises(GrammarError, match=r"too complex: it holds \d+ MB once compiled, expected at most 4$"):
            compiler.compile(schema({"multipleOf": 40_009}))
        assert compiler.compile(schema({"multipleOf": 3})).num_bytes < 1 << 22
    finally:
        compiler.close()


@tells
def test_what_is_dropped_is_given_back_at_once(model: Path) -> None:
    """It does not wait for the garbage collector, to which a grammar of 100 MB is a small object."""
    compiler = GrammarCompiler(model, 512, {1})
    compiler.compile(schema({"multipleOf": 3}))
    gc.collect()
    gc.disable()
    try:
        before = allocated_bytes()
        grammar = compiler.compile(schema({"multipleOf": 40_009}))
        grammar.start()
        assert allocated_bytes() - before > 1 << 23
        del grammar
        assert allocated_bytes() - before < 1 << 22
    finally:
        gc.enable()


def test_what_is_taken_and_given_back_is_told() -> None:
    before = allocated_bytes()
    taken = bytearray(1 << 24)
    while_taken = allocated_bytes()
    del taken
    if before:
        assert while_taken - before >= 1 << 24
        assert allocated_bytes() - before < 1 << 23
