"""Constraints compiled for a vocabulary, by llguidance.

The library computes masks as they are needed, from derivatives of regular expressions and an Earley parser, so a
grammar costs a millisecond to compile however large the vocabulary is. Its limits count work, not time.
"""

import json
import re
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from server.engine.constraint import LONGEST_SOURCE, Constraint, ConstraintKind
from server.engine.matching import Matching
from server.engine.schema_end import can_end

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

SPACES = r"(\n[ ]{0,32}|[ ])?"
"""White space in JSON: none, one space, or a new line with its indentation. The library's own rule has no bound, and
a small model may go on with spaces until `max_tokens`."""

FIRST_STEPS = 4
"""Tokens that a new grammar is tried with: much of what is impossible or too complex fails there."""

STACK_BYTES = 1 << 28
"""Stack of a thread that compiles, of which only the used part takes memory. The library recurses through rules and
references: a chain of 1,000 in a schema of 50 KB needed more than 8 MB and ended the process, 20,000 needed 64 MB."""

FIXED_BYTES, BYTES_PER_CHARACTER = 1 << 16, 320
"""What a grammar is taken to hold when masks have been made of it. Most for a character was found with 5,000 properties
(42 MB for 135 KB) and a regular expression of 100,000 characters (27 MB); a schema of ten fields holds 19 KB.
"""


COPY_SECONDS = 0.005
"""CPU time of compiling, up to which a grammar is compiled for the threads that compute masks. Outputs share what the
library finds out about a grammar's regular expressions, and with it a lock: eight threads computed the masks of 64 rows
no faster than one, and a step of 5.5 ms took 20.7. A schema of ten fields compiles in 1 ms.
"""

SLICES = (
    *(r"[a-z]{1,10}", r"[ ]?[a-zA-Z0-9]{1,10}"),
    *(rf'[^"\\\x00-\x1F\x7F]{{1,{length}}}' for length in range(1, 10)),
)
"""Sets of tokens that a mask takes as a whole where its grammar allows all texts like these, beside the library's own
sets, which hold signs as well: masks of `[a-z]{1,200}` take a quarter (49,152 tokens) to a tenth (128,256) of the time.
The nine short ones are for the end of a bounded string: the slowest percent of such masks take 1.1 instead of 2.0 ms.
"""

LISTING = re.compile(r"\n +1 \| ")


class GrammarError(ValueError):
    """A constraint that cannot be used. The message is a sentence for the client, which does not name the field."""


@dataclass(frozen=True, eq=False)
class Grammar:
    """A compiled constraint, once or several times over. first_mask and seconds: as `Matching` has them.

    num_bytes: an estimate or what was measured, of all `matchers` together.
    """

    matchers: tuple["LLMatcher", ...]
    first_mask: NDArray[np.uint32]
    seconds: float
    num_bytes: int
    started: Iterator[int] = field(default_factory=count)

    def start(self) -> Matching:
        """The state before the first token of an output. Takes 10 microseconds and, later, 20 to 40 KB.

        Raises GrammarError if the library fails, as it may where it has panicked at another of the grammar's outputs.
        """
        matcher = self.matchers[next(self.started) % len(self.matchers)]
        try:
            own = matcher.deep_copy()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # also a panic: it is an engine's own thread that is here
            raise GrammarError(f"it cannot be used ({type(error).__name__})") from error
        return Matching(own, self.first_mask.copy(), self.seconds, lexer=matcher, grammar=self)


class GrammarCompiler:
    """Compiles constraints for the tokenizer in a model's folder, in any thread with a stack of `STACK_BYTES`.

    vocab_size: the model's, which may be larger than the tokenizer's. The tokenizer is read when it is first needed.
    copies: so many times, where that is cheap.
    """

    def __init__(self, folder: Path, vocab_size: int, eos_token_ids: Iterable[int], copies: int = 1) -> None:
        self._copies = copies
        self._folder = folder
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None

    def compile(self, constraint: Constraint) -> Grammar:
        """Raises GrammarError for what is malformed, not supported, too complex, or matched by no text."""
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise GrammarError("this server has no grammar library (llguidance)") from None
        tokenizer, text = self.load(), grammar_text(constraint)
        started = time.thread_time()
        matcher = LLMatcher(tokenizer, text, log_level=0, limits=_limits())
        copies = self._copies if time.thread_time() - started < COPY_SECONDS else 1
        if matcher.is_error():
            raise GrammarError(_sentence(matcher.get_error()))
        if constraint.kind is ConstraintKind.JSON_SCHEMA and not can_end(json.loads(constraint.source)):
            raise GrammarError("what it requires refers to itself: no document that ends is valid")
        if warnings := matcher.get_grammar_warnings():  # a schema may ask not to be told what is not implemented
            raise GrammarError(_sentence(warnings[0]))
        matching = Matching(matcher, np.zeros(-(-self._vocab_size // 32), np.uint32))
        matching.fill()
        if matching.error is not None:
            reason = _sentence(matching.error)
            is_empty = reason.startswith("NoExtension")
            raise GrammarError("no text matches it" if is_empty else f"it is impossible or too complex ({reason})")
        num_bytes = copies * (FIXED_BYTES + BYTES_PER_CHARACTER * len(constraint.source))
        seconds = self._try(Grammar((matcher,), matching.mask, matching.seconds, num_bytes))
        more = (LLMatcher(tokenizer, text, log_level=0, limits=_limits()) for _ in range(copies - 1))
        return Grammar((matcher, *more), matching.mask, seconds, num_bytes)

    def _try(self, grammar: Grammar) -> float:
        """CPU seconds of its masks. Raises GrammarError if it fails within the first tokens of one of its texts."""
        matching = grammar.start()
        for _ in range(FIRST_STEPS):
            allowed = matching.allowed()
            allowed = allowed[~np.isin(allowed, self._eos_token_ids)]
            if not len(allowed):
                break
            matching.advance(int(allowed[0]))
            if matching.error is not None:
                raise GrammarError(f"it is impossible or too complex ({_sentence(matching.error)})")
        return matching.seconds

    def load(self) -> "LLTokenizer":
        """The tokenizer. Raises GrammarError if it cannot be used."""
        from llguidance import LLTokenizer

        with self._lock:
            if self._tokenizer is None:
                try:
                    text = (self._folder / "tokenizer.json").read_text(encoding="utf-8")
                    slices = [*SLICES, *LLTokenizer.general_slices()]
                    eos = self._eos_token_ids
                    self._tokenizer = LLTokenizer(text, n_vocab=self._vocab_size, eos_token=eos, slices=slices)
                except (OSError, ValueError) as error:
                    raise GrammarError("the served model's tokenizer cannot constrain outputs") from error
            return self._tokenizer


def grammar_text(constraint: Constraint) -> str:
    """The constraint in the library's own form. Raises GrammarError."""
    from llguidance import LLMatcher

    if len(constraint.source) > LONGEST_SOURCE:
        raise GrammarError(f"it has {len(constraint.source)} characters, expected at most {LONGEST_SOURCE}")
    try:
        match constraint.kind:
            case ConstraintKind.JSON_OBJECT:
                return _from_schema({"type": "object"})
            case ConstraintKind.JSON_SCHEMA:
                return _from_schema(json.loads(constraint.source))
            case ConstraintKind.REGEX:
                return LLMatcher.grammar_from_regex(constraint.source)
            case ConstraintKind.CHOICE:
                return LLMatcher.grammar_from_lark(_choice(json.loads(constraint.source)))
            case ConstraintKind.GRAMMAR:
                return LLMatcher.grammar_from_lark(_lark(constraint.source))
    except RecursionError:
        raise GrammarError("it is nested too deeply") from None
    except ValueError as error:
        raise GrammarError(_sentence(str(error))) from None


def _from_schema(schema: object) -> str:
    """White space is bounded, unless the library's own keyword `x-guidance` has another rule."""
    from llguidance import LLMatcher

    if schema is False:
        raise GrammarError("nothing is valid under the schema `false`")
    if schema is not True and not isinstance(schema, dict):
        raise GrammarError("a schema is a JSON object, or true")
    return LLMatcher.grammar_from_json_schema({} if schema is True else schema, defaults={"whitespace_pattern": SPACES})


def _choice(texts: object) -> str:
    """As one terminal: a rule may not have more than 2,000 alternatives."""
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise GrammarError("expected a list of texts, not empty")
    return "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(text) for text in texts)


def _lark(text: str) -> str:
    """GBNF, which has `::=` outside of its strings, is translated; Lark is left as it is."""
    from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

    if "::=" not in text or is_lark_syntax(text):
        return text
    try:
        return gbnf_to_lark(text)
    except RecursionError:
        raise
    except Exception as error:  # a parser that raises what comes
        raise GrammarError(_sentence(str(error))) from None


def _limits() -> "LLParserLimits":
    """A tenth to a half of the library's own: an enumeration of 3,000 texts and 500 properties fit, and a mask that was
    made to be slow takes tens of milliseconds instead of hundreds."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=500_000,
        step_lexer_fuel=20_000,
        step_max_items=10_000,
        max_lexer_states=10_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )


def _sentence(message: str) -> str:
    """What the library says, on one line of bounded length, without its listing of the grammar."""
    line = " ".join(LISTING.split(message.replace("<non-verbose/>", ""), maxsplit=1)[0].split())
    return line if len(line) <= 200 else line[:200] + " ..."
