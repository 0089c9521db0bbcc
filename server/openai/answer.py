"""How pieces of text become an answer: what both generating endpoints share."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from server.choice import Piece, ScoredToken
from server.engine.sequence import FinishReason, TokenLogprobs
from server.generation import Generation, Usage
from server.openai.prompt_scores import prompt_logprobs
from server.prompt_decisions import decided_layers
from server.route_view import explained
from server.routed_tokens import routed_tokens

Json = dict[str, Any]

IN_THREAD = 2000
"""Log-probabilities of prompt tokens that are written down in a thread: each costs half a microsecond or more."""


@dataclass(frozen=True)
class Collected:
    """All of one choice."""

    text: str
    tokens: tuple[ScoredToken, ...]
    finish_reason: FinishReason | None
    prompt_scores: tuple[TokenLogprobs, ...] = ()


async def collect(pieces: AsyncIterator[Piece]) -> list[Collected]:
    """The choices in their order, complete."""
    parts: defaultdict[int, list[Piece]] = defaultdict(list)
    async for piece in pieces:
        parts[piece.index].append(piece)
    return [
        Collected(
            text="".join(piece.text for piece in parts[index]),
            tokens=tuple(token for piece in parts[index] for token in piece.tokens),
            finish_reason=parts[index][-1].finish_reason,
            prompt_scores=parts[index][0].prompt_scores,
        )
        for index in sorted(parts)
    ]


class StreamedUsage(Enum):
    """Which events of a stream say what was used."""

    NONE = "none"
    LAST = "last"
    ALWAYS = "always"


class Answer(ABC):
    """One response in the making. Endpoints say how a choice looks; `created` is in seconds since the epoch.

    `prompt_logprobs`: how many of the most likely tokens are told beside each of the prompt's; None: nothing of them.
    """

    id_prefix: str
    whole_object: str
    chunk_object: str

    def __init__(
        self,
        generation: Generation,
        model: str,
        created: int,
        streamed_usage: StreamedUsage = StreamedUsage.NONE,
        prompt_logprobs: int | None = None,
    ) -> None:
        self._generation = generation
        self._model = model
        self._created = created
        self._streamed_usage = streamed_usage
        self._prompt_logprobs = prompt_logprobs
        self._num_ended = 0

    def is_long(self, *parts: Collected | Piece) -> bool:
        """Whether these have so many scores of prompts that the event loop has no time to write them down."""
        return sum(len(score.top) + 1 for part in parts for score in part.prompt_scores) > IN_THREAD

    def whole(self, choices: list[Collected]) -> Json:
        """The body of a response that is not streamed."""
        shown = enumerate(self.shown(choices))
        shaped = [self.choice(index, choices[index]) | {"index": place} for place, index in shown]
        usage = usage_object(self._generation.usage)
        return self._head(self.whole_object) | {"choices": shaped, "usage": usage, "lora": self._lora()}

    def events(self, piece: Piece) -> list[Json]:
        """The events for one piece. The very last has the `lora` object, and the usage if it was asked for."""
        events = [self._event([delta]) for delta in self.deltas(piece)]
        self._num_ended += piece.finish_reason is not None
        if self._num_ended == len(self._generation.choices):
            if self._streamed_usage is not StreamedUsage.NONE:
                events.append(self._event([]) | {"usage": usage_object(self._generation.usage)})
            events[-1]["lora"] = self._lora()
        return events

    def scored_prompt(self, index: int, choice: Collected) -> list[Json | None]:
        """vLLM's `prompt_logprobs` of a choice."""
        generation, most = self._generation, self._prompt_logprobs or 0
        return prompt_logprobs(generation.tokenizer, generation.prompt_of(index), choice.prompt_scores, most)

    def shown(self, choices: list[Collected]) -> Sequence[int]:
        """Which choices a whole answer has, in its order."""
        return range(len(choices))

    @abstractmethod
    def choice(self, index: int, collected: Collected) -> Json:
        """One entry of `choices` in a whole answer."""

    @abstractmethod
    def deltas(self, piece: Piece) -> Iterator[Json]:
        """The entries of `choices` that stream a piece."""

    def _event(self, choices: list[Json]) -> Json:
        event = self._head(self.chunk_object) | {"choices": choices}
        if self._streamed_usage is not StreamedUsage.NONE:
            is_told = self._streamed_usage is StreamedUsage.ALWAYS
            event["usage"] = usage_object(self._generation.usage) if is_told else None
        return event

    def _head(self, kind: str) -> Json:
        identity = f"{self.id_prefix}-{self._generation.id}"
        return {"id": identity, "object": kind, "created": self._created, "model": self._model}

    def _lora(self) -> Json:
        generation = self._generation
        route = generation.routed
        assert route is not None
        shown = explained(route)
        if generation.explains:
            shown |= routed_tokens(route, [choice.routed for choice in generation.choices]) | decided_layers(route)
        return shown


def usage_object(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
