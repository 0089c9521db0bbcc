"""Greedy answers as they are without faults, to be met again under them."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

Json = dict[str, Any]

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a small",
    "Water boils at a temperature of",
    "def add(a, b):\n    return",
)
TOKENS = 16
MARGIN = 0.02
"""Nats between the two best tokens. Rows of other sizes beside a row round it by less: where two tokens are nearer to
each other than this, either is right, and nothing behind it is compared.
"""


def greedy(model: str, prompt: str) -> Json:
    """The request for an answer that is compared."""
    return {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}


@dataclass
class Answers:
    """The sure beginnings of answers, by model (the base model's name, or a digest) and prompt."""

    texts: dict[tuple[str, str], str]

    @classmethod
    async def ask(cls, client: httpx.AsyncClient, base: str, names: Mapping[str, str]) -> "Answers":
        """Of the base model, and of adapters by name, with their digests. Raises httpx.HTTPError, ValueError."""
        asked = [(name, key, prompt) for name, key in {base: base, **names}.items() for prompt in PROMPTS]
        bodies = [greedy(name, prompt) | {"logprobs": 2} for name, _, prompt in asked]
        answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
        texts = {
            (key, prompt): _sure(answer.raise_for_status().json()["choices"][0]["logprobs"])
            for (_, key, prompt), answer in zip(asked, answers, strict=True)
        }
        for prompt in PROMPTS:
            if len({texts[key, prompt] for key in (base, *names.values())}) == len(names) + 1:
                return cls(texts)
        raise ValueError("no prompt tells all adapters from each other: a mixed up one would go unnoticed")

    def agrees(self, key: str, prompt: str, text: str) -> bool:
        """Whether a text, which may have been cut off, is what it has to be as far as that is sure."""
        sure = self.texts.get((key, prompt))
        return sure is not None and (text.startswith(sure) or sure.startswith(text))


def _sure(logprobs: Json) -> str:
    """The text up to the first token that another one nearly was."""
    tokens: Sequence[str] = logprobs["tokens"]
    for place, top in enumerate(logprobs["top_logprobs"]):
        best = sorted(top.values(), reverse=True)
        if len(best) > 1 and best[0] - best[1] < MARGIN:
            return "".join(tokens[:place])
    return "".join(tokens)
