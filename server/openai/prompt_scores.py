"""How likely a prompt's own tokens were, in the two forms that clients ask for."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from server.chat import ChatTokenizer
from server.engine.sequence import TokenLogprobs

Json = dict[str, Any]


@dataclass
class TokenNames:
    """Tokens by name, each looked up once."""

    tokenizer: ChatTokenizer

    def __post_init__(self) -> None:
        self._names: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        name = self._names.get(token)
        if name is None:
            name = self._names[token] = token_name(self.tokenizer.token_bytes(token))
        return name


def token_name(data: bytes) -> str:
    """The token's text, or `bytes:\\xNN...` where it is a part of a character."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def by_name(scored: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Log-probabilities by name. Of tokens that have the same name the first one counts, the most likely."""
    named: dict[str, float] = {}
    for name, value in scored:
        named.setdefault(name, value)
    return named


def echoed(
    tokenizer: ChatTokenizer, prompt: Sequence[int], text: str, scores: Sequence[TokenLogprobs], most: int
) -> Json:
    """OpenAI's older form, parallel lists, for a prompt that the answer repeats as `text`.

    Nothing comes before the first token, so nothing says how likely it was. Of the other tokens' most likely
    alternatives `most` are told, and the token itself.
    """
    names = TokenNames(tokenizer)
    pairs = list(zip(prompt[1:], scores, strict=True))
    return {
        "tokens": [names[token] for token in prompt],
        "token_logprobs": [None, *(score.logprob for score in scores)],
        "top_logprobs": [
            None,
            *(
                by_name([*((names[other], value) for other, value in score.top[:most]), (names[token], score.logprob)])
                for token, score in pairs
            ),
        ],
        "text_offset": text_offsets(tokenizer, prompt, text),
    }


def text_offsets(tokenizer: ChatTokenizer, prompt: Sequence[int], text: str) -> list[int]:
    """Characters of `text` before each token. Special tokens count where the text spells them out, and else have none.

    A token that begins within a character begins where the character does.
    """
    detokenizer, offset, offsets = tokenizer.detokenizer(()), 0, []
    for token in prompt:
        offsets.append(min(offset, len(text)))
        spelled = tokenizer.special_text(token)
        if spelled is None:
            offset += len(detokenizer.feed(token))
        elif text.startswith(spelled, offset):
            offset += len(spelled)
    return offsets


def prompt_logprobs(
    tokenizer: ChatTokenizer, prompt: Sequence[int], scores: Sequence[TokenLogprobs], most: int
) -> list[Json | None]:
    """vLLM's form: for each token the most likely ones at its place, and the token itself, by id."""
    names = TokenNames(tokenizer)

    def entry(token: int, value: float, rank: int) -> Json:
        return {"logprob": value, "rank": rank, "decoded_token": names[token]}

    found: list[Json | None] = [None]
    for token, score in zip(prompt[1:], scores, strict=True):
        ranked = {str(other): entry(other, value, rank) for rank, (other, value) in enumerate(score.top[:most], 1)}
        found.append({str(token): entry(token, score.logprob, score.rank)} | ranked)
    return found
