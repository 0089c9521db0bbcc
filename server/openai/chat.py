"""POST /v1/chat/completions: its request and its answer."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field

from server.ask import Ask
from server.choice import Piece, ScoredToken
from server.engine.sequence import FinishReason
from server.errors import BadRequest
from server.openai.answer import Answer, Collected, Json
from server.openai.messages import Messages, TemplateVariables, plain
from server.openai.protocol import MAX_LOGPROBS, GenerationRequest, served_only
from server.openai.tool_calls import ToolCalls
from server.openai.tools import AnyToolChoice, Tools, tool_use
from server.tenants import Tenant
from server.tools.call_parser import CallParser
from server.tools.definition import ToolUse
from server.tools.form import ToolForm


class ChatRequest(GenerationRequest):
    messages: Messages
    """At most `limits.messages`."""
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """As `max_tokens`, and wins over it."""
    logprobs: bool | None = None
    """Default false."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Default 0. Only when `logprobs` is true."""
    tools: Tools | None = None
    """Functions that the model may call."""
    tool_choice: AnyToolChoice | None = None
    """Default `auto` with tools. A call that is forced is valid, whatever the model: a grammar takes nothing else."""
    parallel_tool_calls: bool | None = None
    """Default true."""
    add_special_tokens: Annotated[Literal[False] | None, served_only(False)] = None
    """Refused: the chat template writes them."""
    chat_template_kwargs: TemplateVariables | None = None
    """Variables of the model's chat template, such as Qwen3's `enable_thinking`; what it does not read is ignored."""

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise BadRequest("top_logprobs: only allowed when logprobs is true", param="top_logprobs")
        _ = self.tool_use  # here, where a large body does not stop the event loop

    def longest_answer(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def ask(self, tenant: Tenant) -> Ask:
        return replace(
            super().ask(tenant),
            messages=plain(self.messages),
            tools=self.tool_use,
            template_variables=self.chat_template_kwargs,
        )

    @cached_property
    def tool_use(self) -> ToolUse | None:
        """The tools that may be called. Raises BadRequest."""
        has_grammar = self.constraint() is not None
        return tool_use(self.tools, self.tool_choice, self.parallel_tool_calls, has_grammar=has_grammar)


class ChatAnswer(Answer):
    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(
        self, *arguments: Any, with_logprobs: bool, tools: ToolUse | None, form: ToolForm, **named: Any
    ) -> None:
        super().__init__(*arguments, **named)
        self._with_logprobs = with_logprobs
        self._tools = tools
        self._form = form
        self._begun: dict[int, ToolCalls | None] = {}

    def choice(self, index: int, collected: Collected) -> Json:
        calls = self._calls(index)
        message = {"content": collected.text} if calls is None else calls.message(collected.text)
        return {
            "index": index,
            "message": {"role": "assistant", **message},
            "logprobs": self._logprobs(collected.tokens),
            "finish_reason": _reason(collected.finish_reason, calls),
        }

    def whole(self, choices: list[Collected]) -> Json:
        """The scores of the prompt, of which there is one, stand beside the choices."""
        body = super().whole(choices)
        if self._prompt_logprobs is not None:
            body["prompt_logprobs"] = self.scored_prompt(0, choices[0])
        return body

    def deltas(self, piece: Piece) -> Iterator[Json]:
        """First the role, then text, at last the reason of the ending."""
        if piece.index not in self._begun:
            self._begun[piece.index] = self._calls(piece.index)
            yield self._delta(piece.index, {"role": "assistant", "content": ""})
        calls, is_end = self._begun[piece.index], piece.finish_reason is not None
        said = [{"content": piece.text}] if piece.text else []
        said = calls.deltas(piece.text, is_end) if calls is not None else said
        if piece.tokens and not said:
            said = [{"content": ""}]
        for number, delta in enumerate(said):
            yield self._delta(piece.index, delta, () if number else piece.tokens)
        if is_end:
            yield self._delta(piece.index, {}) | {"finish_reason": _reason(piece.finish_reason, calls)}

    def _calls(self, index: int) -> ToolCalls | None:
        """What reads the calls of a choice, if there may be any."""
        tools = self._tools
        if tools is None:
            return None
        parser = CallParser(self._form, tools.names, None if tools.is_parallel else 1)
        if tools.is_forced:
            parser.feed(self._form.beginning)
        return ToolCalls(
            parser,
            lambda number: self._form.call_id(f"{self._generation.id}-{index}-{number}"),
            is_forced=tools.is_forced,
        )

    def _delta(self, index: int, delta: Json, tokens: tuple[ScoredToken, ...] = ()) -> Json:
        return {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(tokens) if tokens else None,
            "finish_reason": None,
        }

    def _logprobs(self, tokens: tuple[ScoredToken, ...]) -> Json | None:
        if not self._with_logprobs:
            return None
        content = [
            _scored(token.data, token.logprob) | {"top_logprobs": [_scored(data, value) for data, value in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}


def _reason(reason: FinishReason | None, calls: ToolCalls | None) -> str | None:
    """An answer that ends by itself and has calls ends for their sake."""
    return "tool_calls" if reason is FinishReason.STOP and calls is not None and calls.has_calls else reason


def _scored(data: bytes, logprob: float) -> Json:
    return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}
