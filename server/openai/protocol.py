"""What the requests to both generating endpoints have in common, and how they become an `Ask`."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, Self, TypeVar

from pydantic import BeforeValidator, Field, ValidationInfo, WithJsonSchema, field_validator
from pydantic_core import PydanticCustomError

from adapters_store.types import Composition
from routing.router import NamedWeight, RouteQuery
from server.ask import Ask
from server.body import RequestModel, limits_of, validate
from server.config import LimitSettings
from server.engine.constraint import Constraint
from server.engine.sequence import SamplingParams
from server.errors import BadRequest
from server.openai.answer import StreamedUsage
from server.openai.constraints import ResponseFormat, StructuredOutputs, constraint_of
from server.openai.lora import LoraOptions
from server.query_text import QueryScope
from server.route_options import Name
from server.tenants import Tenant

T = TypeVar("T")

NOT_SERVED: Mapping[str, tuple[object, ...]] = {
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "best_of": (None, 1),
    "max_completion_tokens": (None,),
    "echo": (None, False),
    "use_beam_search": (None, False),
    "suffix": (None, ""),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "web_search_options": (None,),
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
    "logits_processors": (None, []),
    "skip_special_tokens": (None, True),
    "include_stop_str_in_output": (None, False),
    "truncate_prompt_tokens": (None,),
    "prompt_embeds": (None,),
    "return_token_ids": (None, False),
    "return_tokens_as_token_ids": (None, False),
    "length_penalty": (None, 1),
    "early_stopping": (None, False),
    "spaces_between_special_tokens": (None, True),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "add_generation_prompt": (None, True),
    "continue_final_message": (None, False),
    "documents": (None, []),
    "cache_salt": (None,),
}
"""Fields that change the answer and are refused, OpenAI's first, with the values that change nothing."""

IGNORED: Mapping[str, str] = {
    "prediction": "Answers are computed as they come.",
    "prompt_cache_retention": "What is remembered is decided by room alone.",
    "request_id": "The header `x-request-id` is.",
    "mm_processor_kwargs": "The models read text.",
    "kv_transfer_params": "Engines keep their KV to themselves.",
}
"""Fields that clients send, that change no answer and that are not even looked at, and why."""

INSTEAD: Mapping[str, str] = {
    "functions": "tools",
    "function_call": "tool_choice",
    "guided_json": "structured_outputs.json",
    "guided_regex": "structured_outputs.regex",
    "guided_choice": "structured_outputs.choice",
    "guided_grammar": "structured_outputs.grammar",
    "max_completion_tokens": "max_tokens",
}


def served_only(value: bool) -> BeforeValidator:
    """For a field that is there for the one value that changes nothing."""

    def check(given: object) -> object:
        if given is not None and given is not value:
            raise PydanticCustomError("unsupported", "not supported by this server")
        return given

    return BeforeValidator(check)


Token = Annotated[int, Field(ge=0, lt=2**31)]


class StreamOptions(RequestModel):
    """`continuous_usage_stats`, vLLM's: every event says what was used so far, if the usage is wanted at all."""

    include_usage: bool | None = None
    """An event without choices at the end says what was used."""
    continuous_usage_stats: bool | None = None
    """With `include_usage`, every event says what was used so far."""
    include_obfuscation: bool | None = None
    """Ignored: events are not padded."""


LONGEST_STOP = 4096
MAX_STOPS = 16
MAX_LOGPROBS = 20
LONGEST_TIMEOUT = 86_400
MOST_PRIORITY = 2**31 - 1


def _stops(value: object) -> object:
    if not isinstance(value, str):
        return value
    if not 1 <= len(value) <= LONGEST_STOP:
        raise PydanticCustomError("stop_length", "expected 1 to {most} characters", {"most": LONGEST_STOP})
    return [value]


Stop = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]],
    Field(max_length=MAX_STOPS),
    BeforeValidator(_stops),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": MAX_STOPS}]}
    ),
]


class GenerationRequest(RequestModel):
    """Fields of both generating endpoints: OpenAI's, those of them that change nothing here, vLLM's, and our own."""

    model: Name | None = None
    """The base model, an adapter (`name` or `name@digest`), `auto` or `auto:<router>`. Needed unless there is
    `adapter_id`."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Default: the rest of the context. Together with the prompt at most the context."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Default 1. 0 is greedy."""
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Default 1."""
    n: Annotated[int, Field(ge=1)] | None = None
    """Default 1. At most `limits.n`."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """Default: another one each time. Choice i of a prompt samples with seed + i. The same random numbers whatever
    shares the batch, and the same text but where rounding decides."""
    stop: Stop | None = None
    """Texts that end an answer and are not part of it."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Default 0."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Default 0."""
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    """By token id of the served model."""
    stream: bool | None = None
    """Default false. Server-sent events, `[DONE]` at the end; a silent stream sends comments."""
    stream_options: StreamOptions | None = None
    """Only when `stream` is true."""
    response_format: ResponseFormat | None = None
    """What an answer must be. Its schemas are checked: what cannot be kept is refused."""

    user: str | None = None
    """Ignored: tenants are told apart by their keys."""
    store: bool | None = None
    """Ignored: nothing is stored."""
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    """Ignored: nothing is stored."""
    service_tier: str | None = None
    """Ignored: see `priority`."""
    safety_identifier: str | None = None
    """Ignored."""
    prompt_cache_key: str | None = None
    """Ignored: equal beginnings are found by themselves."""
    reasoning_effort: str | None = None
    """Ignored: no served model reasons in levels."""
    verbosity: str | None = None
    """Ignored: no served model answers in levels."""

    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    """Default 0, which like -1 means all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Default 0."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    """Default 1."""
    stop_token_ids: Annotated[list[Token], Field(max_length=1024)] | None = None
    """Tokens that end an answer and are not part of it."""
    ignore_eos: bool | None = None
    """Default false."""
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Default 0. No end before."""
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """So many most likely tokens at each place of the prompt. Not with `stream`."""
    structured_outputs: StructuredOutputs | None = None
    """What an answer must be, in vLLM's words. Not with `response_format`."""

    priority: Annotated[int, Field(ge=-MOST_PRIORITY, le=MOST_PRIORITY)] | None = None
    """Default 0. Smaller goes first among the tenant's own waiting requests."""
    timeout: Annotated[float, Field(gt=0, le=LONGEST_TIMEOUT)] | None = None
    """Seconds; by default there is no limit. Beyond it the request ends, 504 if nothing was sent."""

    adapter_id: Name | None = None
    """LoRAX's name for `model`; it wins where both are given."""
    lora: LoraOptions | None = None
    """Which adapters, or how a router chooses: see below."""

    @field_validator("n")
    @classmethod
    def _few(cls, value: int | None, info: ValidationInfo) -> int | None:
        most = limits_of(info).n
        if value is not None and value > most:
            raise ValueError(f"expected at most {most}")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _token_keys(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or {}:
            if not (key.isascii() and key.isdigit() and len(key) <= 10):
                raise ValueError("expected token ids as keys")
        return value

    @classmethod
    def parse(cls, data: dict[str, Any], limits: LimitSettings) -> Self:
        """The request, checked. Raises BadRequest, also for known fields that this server does not serve."""
        for field, harmless in NOT_SERVED.items():
            if field in data and field not in cls.model_fields and data[field] not in harmless:
                hint = f"; use {INSTEAD[field]}" if field in INSTEAD else ""
                message = f"{field}: not supported by this server{hint}"
                raise BadRequest(message, param=field, code="unsupported_parameter")
        request = validate(cls, data, limits)
        request.check()
        return request

    def check(self) -> None:
        """What concerns more than one field. Raises BadRequest."""
        if self.model is None and self.adapter_id is None:
            raise BadRequest("model: field required", param="model", code="missing_required_parameter")
        if self.stream_options is not None and not self.stream:
            raise BadRequest("stream_options: only allowed when stream is true", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise BadRequest("prompt_logprobs: not available when stream is true", param="prompt_logprobs")
        longest = self.longest_answer()
        if self.min_tokens is not None and longest is not None and self.min_tokens > longest:
            raise BadRequest(f"min_tokens: expected at most max_tokens, {longest}", param="min_tokens")
        if self.lora is not None and self.lora.adapters is not None and self.lora.router is not None:
            raise BadRequest("lora.router: an explicit list of adapters excludes a router", param="lora.router")
        self.constraint()

    @property
    def model_name(self) -> str:
        """LoRAX's `adapter_id` means the same as `model`, and is the more specific where both are given."""
        return self.adapter_id or self.model or ""

    def constraint(self) -> Constraint | None:
        """What the answer must be. Raises BadRequest."""
        return constraint_of(self.response_format, self.structured_outputs)

    def longest_answer(self) -> int | None:
        return self.max_tokens

    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Most likely tokens to report at each step; None reports nothing."""

    def num_prompt_logprobs(self) -> int | None:
        """The same for the tokens of the prompt."""
        return self.prompt_logprobs

    @property
    def streamed_usage(self) -> StreamedUsage:
        options = self.stream_options
        if options is None or not options.include_usage:
            return StreamedUsage.NONE
        return StreamedUsage.ALWAYS if options.continuous_usage_stats else StreamedUsage.LAST

    def sampling(self) -> SamplingParams:
        """All but the seed and the length, which depend on the choice and the prompt."""
        return SamplingParams(
            temperature=_or(self.temperature, 1.0),
            top_k=max(_or(self.top_k, 0), 0),
            top_p=_or(self.top_p, 1.0),
            min_p=_or(self.min_p, 0.0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            min_tokens=_or(self.min_tokens, 0),
            stop_token_ids=frozenset(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=self.num_logprobs(),
            prompt_logprobs=self.num_prompt_logprobs(),
            constraint=self.constraint(),
        )

    def query(self, tenant: Tenant) -> RouteQuery:
        lora = self.lora or LoraOptions()
        adapters = None
        if lora.adapters is not None:
            adapters = tuple(NamedWeight(adapter.name, adapter.weight) for adapter in lora.adapters)
        return RouteQuery(
            tenant=tenant.id,
            model=self.model_name,
            adapters=adapters,
            composition=Composition(lora.composition or "mixture"),
            router=lora.router,
            options=lora.router_options(sticky=bool(lora.sticky), explain=bool(lora.explain)),
            default_router=tenant.default_router,
        )

    def ask(self, tenant: Tenant) -> Ask:
        return Ask(
            tenant=tenant,
            query=self.query(tenant),
            params=self.sampling(),
            scope=QueryScope((self.lora and self.lora.query) or "last_turn"),
            n=_or(self.n, 1),
            seed=self.seed,
            max_tokens=self.longest_answer(),
            stop=tuple(self.stop or ()),
            timeout=self.timeout,
            priority=_or(self.priority, 0),
        )


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
