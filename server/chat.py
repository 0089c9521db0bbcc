"""The tokenizer of the served model: chat messages and text to tokens, tokens to text."""

import inspect
from collections.abc import Callable, Collection, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

import anyio
import anyio.to_thread
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from server.detokenizer import Detokenizer
from server.errors import BadRequest
from server.tools.definition import ToolUse
from server.tools.form import ToolForm
from server.tools.instructions import Message
from server.tools.template import ChatTemplate, Variables

LONG_TEXT = 2048
"""Characters from which text is tokenised in a thread: one or two milliseconds, ten times the hand-over's price."""
RESERVED = frozenset(inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters) | {"messages"}
"""Names that are no variables of a template: they steer who applies it, `chat_template` even to another one."""

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")


class TokenizerError(ValueError):
    """A model folder without a usable tokenizer. The message is one sentence."""


class ChatTokenizer:
    """Text in, tokens out, and back. Long texts are tokenised in a thread, at most `num_threads` at a time.

    `form` is how the model writes tool calls; None finds out by its chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, num_threads: int = 2, form: ToolForm | None = None) -> None:
        self._tokenizer = tokenizer
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._threads = anyio.CapacityLimiter(num_threads)
        self._template = ChatTemplate(self._apply_template, str(tokenizer.chat_template), form)

    @classmethod
    def from_folder(cls, folder: Path, form: ToolForm | None = None) -> "ChatTokenizer":
        """Raises TokenizerError if there is no tokenizer in the folder, or an unreadable one."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the library raises whatever its parsers do
            raise TokenizerError(f"{folder}: cannot load the tokenizer ({_first_line(error)})") from error
        if not getattr(tokenizer, "is_fast", False):
            raise TokenizerError(f"{folder}: expected a tokenizer.json, the tokenizer has no fast form")
        return cls(tokenizer, form=form)

    @property
    def vocab_size(self) -> int:
        return len(self._tokenizer)

    @cached_property
    def max_token_characters(self) -> int:
        """Longest token: no text of more characters than this is one token."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=1)

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. A begin-of-text token that the text spells out itself is not doubled."""
        return await self._run(len(text), self._encode, text, add_special_tokens)

    @property
    def tool_form(self) -> ToolForm:
        """How the model writes tool calls."""
        return self._template.form

    @cached_property
    def special_markers(self) -> dict[str, int]:
        """Ids of those markers of its calls that are special tokens."""
        ids = {marker: self._backend.token_to_id(marker) for marker in self.tool_form.markers}
        return {marker: token for marker, token in ids.items() if token in self._special_ids}

    async def encode_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: ToolUse | None = None,
        variables: Variables | None = None,
    ) -> list[int]:
        """The messages and tools in the model's chat template, or without its help if it knows no tools.

        Where a call is forced, the beginning of one follows. `variables` must not have names of `RESERVED`; those that
        the template does not read change nothing. Raises BadRequest if the template refuses the messages.
        """
        length = num_characters(messages, tools) + 16 * len(messages)
        return await self._run(length, self._encode_chat, messages, add_generation_prompt, tools, variables or {})

    async def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        return await self._run(4 * len(tokens), self._decode, tokens, skip_special_tokens)

    def detokenizer(self, prompt: Sequence[int], shown: Collection[str] = ()) -> Detokenizer:
        """Incremental decoding of the output that follows `prompt`; special tokens have no text, but those `shown`."""
        skip = self._special_ids - {self._backend.token_to_id(token) for token in shown}
        return Detokenizer(partial(self._backend.decode, skip_special_tokens=False), skip, prompt)

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's own spelling of tokens; empty for ids that have none."""
        return [self._backend.id_to_token(token) or "" for token in ids]

    def special_text(self, token: int) -> str | None:
        """How a special token is spelled; None for all other tokens."""
        return self._backend.id_to_token(token) if token in self._special_ids else None

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for, also where they are only a part of a character."""
        spelled = self._backend.id_to_token(token)
        if spelled is None:
            return b""
        if token in self._added:
            return spelled.encode()
        if self._byte_level:
            return b"".join(
                bytes((self._byte_level[character],)) if character in self._byte_level else character.encode()
                for character in spelled
            )
        if len(spelled) == 6 and spelled.startswith("<0x") and spelled.endswith(">"):
            return bytes.fromhex(spelled[3:5])
        return spelled.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._backend.get_added_tokens_decoder())

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self._backend.get_added_tokens_decoder()
        return frozenset(self._tokenizer.all_special_ids) | {token for token, about in added.items() if about.special}

    @cached_property
    def _byte_level(self) -> dict[str, int]:
        """Byte of each character of a byte-level vocabulary; empty if the vocabulary is another."""
        state = self._backend.decoder.__getstate__() if self._backend.decoder is not None else b""
        return _byte_alphabet() if b'"ByteLevel"' in state else {}

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # Unlike `encode`, `encode_batch` lets go of the interpreter lock: 2 MB of text stopped other threads for 4.3 s.
        tokens: list[int] = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids
        bos = self._tokenizer.bos_token_id
        doubled = add_special_tokens and bos is not None and tokens[:2] == [bos, bos]
        return tokens[1:] if doubled else tokens

    def _encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool, tools: ToolUse | None, variables: Variables
    ) -> list[int]:
        if not self._tokenizer.chat_template:
            raise BadRequest(
                "the served model has no chat template; use /v1/completions", param="messages", code="no_chat_template"
            )
        try:
            text = self._template.render(messages, tools, add_generation_prompt, variables)
        except Exception as error:  # a template is a program of the model's: it raises what it likes
            raise BadRequest(
                f"the model's chat template refuses the messages: {_first_line(error)}", param="messages"
            ) from error
        # The template writes the special tokens itself.
        return self._encode(text, add_special_tokens=False)

    def _apply_template(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Variables,
    ) -> str:
        assert not RESERVED & variables.keys()
        text: str = self._tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt, **variables
        )
        return text

    def _decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        text: str = self._backend.decode(tokens, skip_special_tokens=skip_special_tokens)
        return text

    async def _run(self, length: int, work: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        if length < LONG_TEXT:
            return work(*arguments)
        return await anyio.to_thread.run_sync(work, *arguments, limiter=self._threads)


def num_characters(messages: Sequence[Message], tools: ToolUse | None = None) -> int:
    """Characters of what messages and tools say, which no template leaves out."""
    calls = [call["function"] for message in messages for call in message.get("tool_calls") or ()]
    said = sum(len(message["content"]) for message in messages) + sum(len(call["arguments"]) for call in calls)
    return said + (tools.length if tools is not None else 0)


def _byte_alphabet() -> dict[str, int]:
    """The character for each byte in byte-level vocabularies: itself where printable (Radford et al. 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
