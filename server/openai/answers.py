"""What OpenAI's endpoints answer, as the documentation describes it; `answer.py` and the routes make it."""

from typing import Annotated, Any, Literal

from pydantic import Field

from server.answers import LATE, REFUSALS, AnswerModel, RouteAnswer

STREAMED: dict[str, Any] = {
    "text/event-stream": {
        "schema": {
            "type": "string",
            "description": "With `stream`: events, each `data: ` and a JSON object, at last `data: [DONE]`.",
        }
    }
}
FinishReason = Literal["stop", "length", "tool_calls"]


class RoutedToken(AnswerModel):
    text: str
    adapter: Annotated[str | None, Field(description="Null is the base model alone.")]
    share: float


class Probability(AnswerModel):
    name: str
    probability: float


class DecidedLayer(AnswerModel):
    chosen: list[str]
    probabilities: tuple[Probability, ...] = ()


class Lora(RouteAnswer):
    """Which adapters answered, and who chose them."""

    tokens: Annotated[
        tuple[list[RoutedToken], ...],
        Field(description="By choice, who led each token: of token-level routers, with `lora.explain`."),
    ] = ()
    layers: Annotated[
        tuple[DecidedLayer, ...],
        Field(description="What acts in each layer: of prompt-level routers, with `lora.explain`."),
    ] = ()


class CachedTokens(AnswerModel):
    cached_tokens: Annotated[int, Field(description="Of the prompts' tokens those that were known already.")]


class Usage(AnswerModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class PromptToken(AnswerModel):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = Annotated[
    tuple[dict[str, PromptToken] | None, ...],
    Field(description="For each token of the prompt the most likely ones at its place by id, if they were asked for."),
]


class ScoredToken(AnswerModel):
    token: str
    logprob: float
    bytes: list[int]


class ChosenToken(ScoredToken):
    top_logprobs: list[ScoredToken]


class ChatLogprobs(AnswerModel):
    content: list[ChosenToken]
    refusal: None


class CalledFunction(AnswerModel):
    name: str
    arguments: Annotated[str, Field(description="JSON as the model wrote it; where the call was forced it is valid.")]


class ToolCall(AnswerModel):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(AnswerModel):
    role: Literal["assistant"]
    content: str | None
    tool_calls: tuple[ToolCall, ...] = ()


class ChatChoice(AnswerModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class Answered(AnswerModel):
    id: str
    created: int
    model: Annotated[str, Field(description="As the request gave it; `lora` says what it meant.")]
    usage: Usage
    lora: Lora


class ChatCompletion(Answered):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    prompt_logprobs: PromptLogprobs = ()


class TextLogprobs(AnswerModel):
    """Parallel lists; the first token of an echoed prompt has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: Annotated[list[int], Field(description="In characters.")]


class TextChoice(AnswerModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason
    prompt_logprobs: PromptLogprobs = ()


class TextCompletion(Answered):
    object: Literal["text_completion"]
    choices: list[TextChoice]


class Permission(AnswerModel):
    """What clients of OpenAI's first API read: the caller may use the model."""

    id: str
    object: Literal["model_permission"]
    created: int
    allow_create_engine: bool
    allow_sampling: bool
    allow_logprobs: bool
    allow_search_indices: bool
    allow_view: bool
    allow_fine_tuning: bool
    organization: str
    group: None
    is_blocking: bool


class Model(AnswerModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: Annotated[str, Field(description="Of an adapter its digest.")]
    parent: Annotated[str | None, Field(description="Of an adapter the base model.")]
    kind: Literal["base", "embedding", "adapter"]
    max_model_len: Annotated[int | None, Field(description="Tokens; adapters have the base model's.")] = None
    dimensions: Annotated[int | None, Field(description="Of the embedding model.")] = None
    permission: list[Permission]


class ModelList(AnswerModel):
    object: Literal["list"]
    data: list[Model]
    next: Annotated[str | None, Field(description="`cursor` of the following part; null at the end.")]


class Embedding(AnswerModel):
    object: Literal["embedding"]
    index: int
    embedding: Annotated[list[float] | str, Field(description="base64 of little-endian float32 if it was asked for.")]


class EmbeddingUsage(AnswerModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(AnswerModel):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Tokens(AnswerModel):
    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: Annotated[tuple[str, ...], Field(description="If they were asked for.")] = ()


class Text(AnswerModel):
    prompt: str


def answers(model: type[AnswerModel], *, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that answers with this, and may refuse. What `streams` has a deadline, too."""
    good: dict[str, Any] = {"model": model} | ({"content": STREAMED} if streams else {})
    return {200: good} | REFUSALS | (LATE if streams else {})
