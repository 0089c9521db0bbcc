"""Embeddings for clients, by the encoder that also routes prompts."""

import asyncio
from collections.abc import Sequence

import numpy as np

from routing.encoder import Encoder, EncoderUnavailable
from routing.encoder_model import CHARACTERS_PER_TOKEN
from routing.encoder_tokenizer import EncoderTokenizer
from server.errors import BadRequest, Unavailable

TURN = 64
"""Texts of one request that are computed before another request's turn comes."""


class Embedder:
    """The embedding model `name`. Vectors are what sentence-transformers gives for the texts as they are."""

    def __init__(self, name: str, encoder: Encoder, tokenizer: EncoderTokenizer) -> None:
        self.name = name
        self.width = encoder.width
        self.max_tokens = tokenizer.max_tokens
        self._encoder = encoder
        self._tokenizer = tokenizer

    async def read(self, inputs: Sequence[str | tuple[int, ...]], truncates: bool) -> tuple[list[str], int]:
        """The texts, and how many tokens are read of them. Token ids become the text that has them.

        Raises BadRequest for what is empty, longer than the encoder reads unless the caller `truncates`, or no tokens
        of this encoder.
        """
        longest = self.max_tokens * CHARACTERS_PER_TOKEN
        for number, given in enumerate(inputs):
            if not given:
                raise BadRequest("input: expected no empty text", param="input")
            if len(given) > (longest if isinstance(given, str) else self.max_tokens) and not truncates:
                raise self._too_long(number, f"{len(given)} {'characters' if isinstance(given, str) else 'tokens'}")
        texts, counts = await asyncio.to_thread(self._read, inputs, longest)
        for number, count in enumerate(counts):
            if count > self.max_tokens and not truncates:
                raise self._too_long(number, f"{count} tokens")
        return texts, sum(min(count, self.max_tokens) for count in counts)

    async def embed(self, texts: Sequence[str], tenant: str) -> np.ndarray:
        """(n, width) float32, rows of length 1, of what a tenant asks. Raises Unavailable.

        A single text is what somebody waits for, as routing does; many go when nobody waits.
        """
        rows: list[np.ndarray] = []
        try:
            for start in range(0, len(texts), TURN):
                part = texts[start : start + TURN]
                rows.append(await self._encoder.embed(part, tenant=tenant, bulk=len(texts) > 1))
        except EncoderUnavailable as error:
            raise Unavailable(
                "the embedding model is not available; please retry", code="encoder_unavailable"
            ) from error
        return np.concatenate(rows)

    def _read(self, inputs: Sequence[str | tuple[int, ...]], longest: int) -> tuple[list[str], list[int]]:
        texts = [self._text(given)[:longest] for given in inputs]
        return texts, self._tokenizer.count(texts)

    def _text(self, given: str | tuple[int, ...]) -> str:
        if isinstance(given, str):
            return given
        largest = self._tokenizer.vocab_size - 1
        if not all(0 <= token <= largest for token in given):
            raise BadRequest(f"input: expected token ids from 0 to {largest}", param="input")
        text = self._tokenizer.text(given[: self.max_tokens])
        if text is None:
            # Clients that count tokens by OpenAI's vocabularies send ids of those: numbers that mean nothing here.
            message = f"input: these ids are no text in the vocabulary of {self.name}, expected the text itself"
            raise BadRequest(message, param="input")
        return text

    def _too_long(self, number: int, what: str) -> BadRequest:
        message = f"input: text {number} has {what}; {self.name} reads {self.max_tokens} tokens"
        return BadRequest(message, param="input", code="context_length_exceeded")
