"""POST /v1/completions: its request and its answer."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, WithJsonSchema, field_validator

from server.ask import Ask
from server.body import limits_of
from server.choice import Piece, ScoredToken
from server.engine.sequence import TokenLogprobs
from server.errors import BadRequest
from server.openai.answer import Answer, Collected, Json
from server.openai.inputs import INPUTS_SCHEMA, Inputs, inputs_of
from server.openai.prompt_scores import by_name, echoed, token_name
from server.openai.protocol import MAX_LOGPROBS, GenerationRequest, served_only
from server.tenants import Tenant


def _prompts(value: object, info: ValidationInfo) -> Inputs:
    return inputs_of(value, "prompt", limits_of(info).prompts)


Prompts = Annotated[Any, BeforeValidator(_prompts), WithJsonSchema(INPUTS_SCHEMA)]


class CompletionRequest(GenerationRequest):
    prompt: Prompts
    """One or many; several at most `limits.prompts`."""
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """Default: the rest of the context. 0 only scores the prompt."""
    echo: bool | None = None
    """Default false. The prompt stands before the answer, with its log-probabilities if `logprobs` is given."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """So many most likely tokens at each place."""
    add_special_tokens: Annotated[Literal[True] | None, served_only(True)] = None
    """Refused: texts get them, token ids are as they are."""
    best_of: Annotated[int, Field(ge=1)] | None = None
    """Default `n`, and at most `limits.n`. So many candidates, of which the `n` with the most likely tokens on average
    are answered; the usage has them all. Not with `stream` if it is more than `n`."""

    @field_validator("best_of")
    @classmethod
    def _few_candidates(cls, value: int | None, info: ValidationInfo) -> int | None:
        most = limits_of(info).n
        if value is not None and value > most:
            raise ValueError(f"expected at most {most}")
        return value

    def check(self) -> None:
        super().check()
        if self.candidates < self.choices:
            raise BadRequest(f"best_of: expected at least n, {self.choices}", param="best_of")
        if self.candidates > self.choices and self.stream:
            raise BadRequest("best_of: more than n are not available when stream is true", param="best_of")

    @property
    def choices(self) -> int:
        """How many a prompt are answered."""
        return self.n or 1

    @property
    def candidates(self) -> int:
        """How many a prompt are generated."""
        return self.best_of or self.choices

    def num_logprobs(self) -> int | None:
        """Candidates need at least that of their own tokens."""
        return 0 if self.logprobs is None and self.candidates > self.choices else self.logprobs

    def num_prompt_logprobs(self) -> int | None:
        """Those that an echo shows, and those that are asked for by name."""
        echoed = self.logprobs if self.echo else None
        return max((most for most in (echoed, self.prompt_logprobs) if most is not None), default=None)

    def ask(self, tenant: Tenant) -> Ask:
        return replace(super().ask(tenant), prompts=self.prompt, n=self.candidates)


class CompletionAnswer(Answer):
    """`echoes` are the prompts' texts, one a prompt, if they are to stand before the answers.

    `logprobs`: how many of the most likely tokens are told beside each; None: nothing of them. Of `candidates` a prompt
    the best `n` are answered.
    """

    id_prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(
        self,
        *arguments: Any,
        logprobs: int | None,
        candidates: int,
        n: int,
        echoes: Sequence[str] = (),
        **named: Any,
    ) -> None:
        super().__init__(*arguments, **named)
        self._most = logprobs
        self._candidates = candidates
        self._n = n
        self._echoes = echoes
        self._begun: set[int] = set()

    def shown(self, choices: list[Collected]) -> Sequence[int]:
        """Of each prompt's candidates those with the most likely tokens on average; among equals the first."""
        if self._candidates == self._n:
            return super().shown(choices)
        prompts = range(0, len(choices), self._candidates)
        ranked = [
            sorted(range(first, first + self._candidates), key=lambda index: -_likelihood(choices[index]))
            for first in prompts
        ]
        return [index for own in ranked for index in own[: self._n]]

    def choice(self, index: int, collected: Collected) -> Json:
        choice = {
            "index": index,
            "text": self._echo(index) + collected.text,
            "logprobs": self._scored(index, collected.tokens, collected.prompt_scores),
            "finish_reason": collected.finish_reason,
        }
        if self._prompt_logprobs is not None:
            choice["prompt_logprobs"] = self.scored_prompt(index, collected)
        return choice

    def deltas(self, piece: Piece) -> Iterator[Json]:
        is_first = piece.index not in self._begun
        self._begun.add(piece.index)
        yield {
            "index": piece.index,
            "text": self._echo(piece.index) + piece.text if is_first else piece.text,
            "logprobs": self._scored(piece.index, piece.tokens, piece.prompt_scores if is_first else None),
            "finish_reason": piece.finish_reason,
        }

    def _echo(self, index: int) -> str:
        return self._echoes[index // self._candidates] if self._echoes else ""

    def _scored(
        self, index: int, tokens: Sequence[ScoredToken], prompt_scores: Sequence[TokenLogprobs] | None
    ) -> Json | None:
        """OpenAI's older form: parallel lists. With `prompt_scores` those of the echoed prompt come first."""
        if self._most is None:
            return None
        text = self._echo(index)
        lists: Json = {
            "tokens": [token_name(token.data) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                by_name((token_name(data), value) for data, value in (*token.top, (token.data, token.logprob)))
                for token in tokens
            ],
            "text_offset": [len(text) + token.offset for token in tokens],
        }
        if prompt_scores is None or not self._echoes:
            return lists
        generation = self._generation
        before = echoed(generation.tokenizer, generation.prompt_of(index), text, prompt_scores, self._most)
        return {name: before[name] + values for name, values in lists.items()}


def _likelihood(choice: Collected) -> float:
    """The mean log-probability of its tokens. A text without any had nothing unlikely in it."""
    return sum(token.logprob for token in choice.tokens) / max(1, len(choice.tokens))
