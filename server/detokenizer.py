"""Tokens to text while they come: no broken characters, no lost spaces, nothing said twice."""

from collections.abc import Callable, Collection, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CONTEXT_TOKENS = 8
"""Prompt tokens decoded before the first output token, so that a leading space stays where the whole text has it."""
MAX_PENDING = 4
"""A character has at most four bytes, so bytes that are still incomplete after four tokens never become one."""
MAX_INCOMPLETE = 3
"""Replacement characters at the end of the text that may still become one character."""
TRIM_TOKENS = 6
"""Window length at which its head is dropped, at the price of a second decode: 3, 6, 12 and 32 cost 2.7, 2.4, 2.9 and
5.1 microseconds a token with byte-level BPE."""
LONGEST_WINDOW = 64

Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """Incremental decoding of one output.

    The pieces add up to `decode(prompt + output)` without `decode(prompt)`. Text that ends inside a character is held
    back; bytes that never become a character end up as replacement characters. `skip` are the ids without text
    (special tokens). A window of recent tokens is decoded again at each step, since the text of a token depends on
    its neighbours: spaces in metaspace decoders, bytes in byte-level and byte-fallback ones. The stream decoder of
    `tokenizers` has no flush and raises on byte-fallback runs whose decoding changes as they grow.
    """

    def __init__(self, decode: Decode, skip: Collection[int] = (), prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        self._skip = skip
        self._window = [token for token in prompt[-CONTEXT_TOKENS:] if token not in skip]
        self._boundary = 0
        self._pending = 0
        self._out = self._cut_context()

    def feed(self, token: int) -> str:
        """The text that is certain now and was not before."""
        if token in self._skip:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        if len(text) > self._out and not text.endswith(REPLACEMENT):
            return self._complete(text)
        stable = len(text.rstrip(REPLACEMENT))
        self._pending = 0 if stable > self._out else self._pending + 1
        if self._pending >= MAX_PENDING:
            stable = max(self._out, len(text) - MAX_INCOMPLETE)
        if len(self._window) >= LONGEST_WINDOW:
            return self._give_up(text)
        return self._emit(text, stable)

    def flush(self) -> str:
        """What was held back. The output has ended."""
        text = self._decode(self._window) if self._window else ""
        return self._emit(text, len(text))

    def _cut_context(self) -> int:
        """Characters of the context, without one that only the output completes.

        A head that is the rest of a character is dropped: it would spoil a whole run of fallback bytes.
        """
        tokens = self._window
        for start in range(min(MAX_PENDING, len(tokens))):
            for stop in range(len(tokens), max(start - 1, len(tokens) - MAX_PENDING), -1):
                text = self._decode(tokens[start:stop]) if stop > start else ""
                if not (text.startswith(REPLACEMENT) or text.endswith(REPLACEMENT)):
                    del tokens[:start]
                    return len(text)
        return len(self._decode(tokens)) if tokens else 0

    def _emit(self, text: str, stop: int) -> str:
        piece = text[self._out : stop]
        self._out = max(self._out, stop)
        return piece

    def _complete(self, text: str) -> str:
        """The text ends with a whole character: tokens before the previous such place are no longer needed."""
        piece = self._emit(text, len(text))
        self._pending = 0
        if len(self._window) >= TRIM_TOKENS and self._boundary:
            del self._window[: self._boundary]
            self._out = len(self._decode(self._window))
        self._boundary = len(self._window)
        return piece

    def _give_up(self, text: str) -> str:
        """A long run of bytes that form no character: start afresh, or each step would decode all of it again."""
        piece = self._emit(text, len(text))
        del self._window[:-1]
        self._boundary, self._pending, self._out = 0, 0, len(self._decode(self._window))
        return piece
