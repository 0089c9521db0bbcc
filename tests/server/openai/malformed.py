"""Malformed requests: what is sent, and the error that must come back."""

from dataclasses import dataclass
from typing import Any

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
USER = [{"role": "user", "content": "Hi"}]


@dataclass(frozen=True)
class Case:
    """`body` is sent as JSON, or as it is if it is bytes."""

    url: str
    body: Any
    param: str | None
    code: str = "invalid_value"
    status: int = 400
    content_type: str = "application/json"

    def __str__(self) -> str:
        shown = self.body if isinstance(self.body, bytes) else str(self.body).encode()
        return f"{self.url} {shown[:60]!r}"


def chat(param: str | None, code: str = "invalid_value", status: int = 400, **fields: Any) -> Case:
    return Case(CHAT, {"model": "tiny", "messages": USER, **fields}, param, code, status)


def text(param: str | None, code: str = "invalid_value", status: int = 400, **fields: Any) -> Case:
    return Case(TEXT, {"model": "tiny", "prompt": "Hi", **fields}, param, code, status)


def raw(body: bytes, param: str | None = None, code: str = "invalid_json", url: str = CHAT) -> Case:
    return Case(url, body, param, code)


def lora(param: str, code: str = "invalid_value", status: int = 400, **fields: Any) -> Case:
    return chat(param, code, status, lora=fields)


BODIES = [
    raw(b""),
    raw(b"{"),
    raw(b'{"model": "tiny", "messages": [{"role": "user"'),
    raw(b"[]"),
    raw(b'"text"'),
    raw(b"null"),
    raw(b"\xff\xfe{}"),
    raw(b'{"model": "tiny", "messages": []} trailing'),
    raw(b"[" * 100_000),
    raw(b'{"a":' * 100_000),
    raw(b'{"model": "tiny", "temperature": NaN}'),
    raw(b'{"model": "tiny", "temperature": -Infinity}'),
    raw(b'{"model": "tiny", "seed": ' + b"9" * 5000 + b"}"),
    raw(b'{"model": "tiny", "model": "sql", "messages": []}', "model", "duplicate_field"),
    raw(b'{"model": "tiny", "lora": {"adapters": [{"name": "sql", "name": "sql"}]}}', "name", "duplicate_field"),
    raw(
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
        "messages.0.content",
        "invalid_value",
    ),
    raw(b'{"model": "tiny", "prompt": ["ok", "\\udfff"]}', "prompt.1", "invalid_value", TEXT),
    raw(b'{"model": "tiny", "messages": [], "temperature": 1e999}', "temperature", "invalid_value"),
    Case(CHAT, b"model=tiny", None, "unsupported_media_type", 415, "application/x-www-form-urlencoded"),
    Case(TEXT, b"{}", None, "unsupported_media_type", 415, "text/plain"),
    Case(TEXT, b'{"prompt": "' + b"x" * (17 << 20) + b'"}', None, "body_too_large", 413),
]

FIELDS = [
    chat("model", "missing_required_parameter", model=None),
    chat("model", "invalid_type", model=7),
    chat("model", "invalid_value", model=""),
    chat("model", "model_not_found", 404, model="nobody"),
    chat("model", "model_not_found", 404, model="../../etc/passwd"),
    chat("model", "model_not_found", 404, model="sql@ffffffff"),
    chat("model", "model_not_found", 404, adapter_id="nobody"),
    chat("model", "no_router", model="auto"),
    chat("model", "no_router", model="auto:retriever"),
    chat("messages", "invalid_type", messages=None),
    chat("messages", "invalid_type", messages="Hi"),
    chat("messages", messages=[]),
    chat("messages.0", "invalid_type", messages=["Hi"]),
    chat("messages.0.role", "missing_required_parameter", messages=[{"content": "Hi"}]),
    chat("messages.0.role", messages=[{"role": "wizard", "content": "Hi"}]),
    chat("messages.0.role", messages=[{"role": "function", "name": "f", "content": "Hi"}]),
    chat("messages.0.content", "missing_required_parameter", messages=[{"role": "user"}]),
    chat("messages.0.content", "invalid_type", messages=[{"role": "user", "content": None}]),
    chat("messages.0.content", "invalid_type", messages=[{"role": "user", "content": 3}]),
    chat("messages.0.content", messages=[{"role": "user", "content": []}]),
    chat("messages.0.content.0.type", messages=[{"role": "user", "content": [{"type": "image_url", "text": ""}]}]),
    chat(
        "messages.0.content.0.text",
        "missing_required_parameter",
        messages=[{"role": "user", "content": [{"type": "text"}]}],
    ),
    chat("messages", messages=[*USER, {"role": "system", "content": "late"}]),
    chat("messages", "context_length_exceeded", messages=[{"role": "user", "content": "漢" * 300}]),
    chat("messages", "context_length_exceeded", messages=[{"role": "user", "content": "x" * 1_000_000}]),
    chat("messages", "context_length_exceeded", max_tokens=10_000),
    chat("max_tokens", max_tokens=0),
    chat("max_tokens", max_tokens=-1),
    chat("max_tokens", "invalid_type", max_tokens="5"),
    chat("max_tokens", "invalid_type", max_tokens=1.5),
    chat("max_tokens", "invalid_type", max_tokens=True),
    chat("max_completion_tokens", max_completion_tokens=0),
    chat("temperature", temperature=-0.1),
    chat("temperature", temperature=2.1),
    chat("temperature", "invalid_type", temperature="hot"),
    chat("temperature", "invalid_type", temperature=[1]),
    chat("top_p", top_p=1.1),
    chat("top_p", top_p=-1),
    chat("top_k", top_k=-2),
    chat("top_k", "invalid_type", top_k=1.5),
    chat("min_p", min_p=2),
    chat("n", n=0),
    chat("n", n=17),
    chat("n", n=10**30),
    chat("n", "invalid_type", n="2"),
    chat("seed", seed=2**63),
    chat("seed", "invalid_type", seed="lucky"),
    chat("stop", stop=[str(number) for number in range(17)]),
    chat("stop", stop=""),
    chat("stop.1", stop=["ok", ""]),
    chat("stop.0", "invalid_type", stop=[1]),
    chat("stop", "invalid_type", stop={"a": 1}),
    chat("stop", stop="x" * 5000),
    chat("stop_token_ids.0", stop_token_ids=[-1]),
    chat("stop_token_ids", stop_token_ids=[10**6]),
    chat("stop_token_ids", "invalid_type", stop_token_ids=5),
    chat("ignore_eos", "invalid_type", ignore_eos="yes"),
    chat("min_tokens", min_tokens=-1),
    chat("min_tokens", min_tokens=10**30),
    chat("repetition_penalty", repetition_penalty=1e-300),
    text("prompt", prompt=[-1], echo=True),
    text("prompt", prompt=[2**40], echo=True),
    text("prompt", "context_length_exceeded", prompt=[1] * 1000, echo=True),
    chat("messages", "context_length_exceeded", messages=USER * 1000),
    chat("min_tokens", min_tokens=9, max_tokens=5),
    chat("presence_penalty", presence_penalty=2.5),
    chat("frequency_penalty", frequency_penalty=-3),
    chat("repetition_penalty", repetition_penalty=0),
    chat("logit_bias.5", logit_bias={"5": 101}),
    chat("logit_bias", logit_bias={"five": 1}),
    chat("logit_bias", logit_bias={"-1": 1}),
    chat("logit_bias", logit_bias={"999999": 1}),
    chat("logit_bias", "invalid_type", logit_bias=[1]),
    chat("logprobs", "invalid_type", logprobs=3),
    chat("top_logprobs", logprobs=True, top_logprobs=21),
    chat("top_logprobs", top_logprobs=2),
    chat("prompt_logprobs", prompt_logprobs=21),
    chat("prompt_logprobs", prompt_logprobs=-1),
    chat("prompt_logprobs", "invalid_type", prompt_logprobs=True),
    chat("prompt_logprobs", prompt_logprobs=1, stream=True),
    text("prompt_logprobs", prompt_logprobs=0, stream=True),
    text("prompt", "too_many_logprobs", prompt=[[5] * 100] * 128, max_tokens=0, echo=True, logprobs=20),
    chat("priority", priority=2**31),
    chat("priority", "invalid_type", priority=1.5),
    chat("priority", "invalid_type", priority="high"),
    chat("timeout", timeout=0),
    chat("timeout", timeout=-1.5),
    chat("timeout", timeout=1e9),
    chat("timeout", "invalid_type", timeout="5"),
    chat("timeout", "invalid_type", timeout=True),
    chat("stream", "invalid_type", stream="yes"),
    chat("stream_options", stream_options={"include_usage": True}),
    chat("stream_options.include_usage", "invalid_type", stream=True, stream_options={"include_usage": 1}),
    chat(
        "stream_options.continuous_usage_stats",
        "invalid_type",
        stream=True,
        stream_options={"continuous_usage_stats": "all"},
    ),
    chat("response_format", "invalid_type", response_format="json_object"),
    chat("response_format.type", "missing_required_parameter", response_format={}),
    chat("response_format.type", response_format={"type": "xml"}),
    chat("response_format.json_schema", "missing_required_parameter", response_format={"type": "json_schema"}),
    chat(
        "response_format.json_schema.name",
        "missing_required_parameter",
        response_format={"type": "json_schema", "json_schema": {"schema": {}}},
    ),
    chat(
        "response_format.json_schema.schema",
        "missing_required_parameter",
        response_format={"type": "json_schema", "json_schema": {"name": "n"}},
    ),
    chat(
        "response_format.json_schema.schema",
        "invalid_type",
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": "{}"}},
    ),
    chat(
        "response_format.json_schema.schema",
        "invalid_constraint",
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["x" * 2**17]}}},
    ),
    chat("structured_outputs", "invalid_type", structured_outputs="a+"),
    chat("structured_outputs", structured_outputs={"regex": "a", "choice": ["a"]}),
    chat("structured_outputs", structured_outputs={"regexp": "a"}),
    chat("structured_outputs", structured_outputs={"regex": None, "disable_any_whitespace": False}),
    chat("structured_outputs", structured_outputs={"regex": "a"}, response_format={"type": "json_object"}),
    chat("structured_outputs.regex", "invalid_type", structured_outputs={"regex": ["a"]}),
    chat("structured_outputs.regex", "invalid_constraint", structured_outputs={"regex": "a" * (2**17 + 1)}),
    chat("structured_outputs.choice", structured_outputs={"choice": []}),
    chat("structured_outputs.choice.1", "invalid_type", structured_outputs={"choice": ["a", 1]}),
    chat("structured_outputs.json_object", "invalid_type", structured_outputs={"json_object": 1}),
    chat("structured_outputs.structural_tag", "unsupported_parameter", structured_outputs={"structural_tag": "{}"}),
    chat(
        "structured_outputs.disable_any_whitespace",
        "unsupported_parameter",
        structured_outputs={"disable_any_whitespace": True},
    ),
    text("structured_outputs.grammar", "invalid_type", structured_outputs={"grammar": {}}),
    chat("user", "invalid_type", user=5),
    chat("store", "invalid_type", store="yes"),
    chat("metadata", "invalid_type", metadata=["a"]),
    chat("metadata.a", "invalid_type", metadata={"a": 1}),
    chat("metadata", metadata={str(number): "" for number in range(17)}),
    chat("service_tier", "invalid_type", service_tier=1),
    chat("reasoning_effort", "invalid_type", reasoning_effort=3),
    text("prompt", "missing_required_parameter", prompt=...),
    text("prompt", "invalid_type", prompt=None),
    text("prompt", "invalid_type", prompt=[]),
    text("prompt", "invalid_type", prompt={"a": 1}),
    text("prompt", "invalid_type", prompt=["a", 1]),
    text("prompt", "invalid_type", prompt=[1, "a"]),
    text("prompt", "invalid_type", prompt=[[1], []]),
    text("prompt", "invalid_type", prompt=[[1.5]]),
    text("prompt", "invalid_type", prompt=[True]),
    text("prompt", prompt=[-1]),
    text("prompt", prompt=[10**9]),
    text("prompt", prompt=[10**30]),
    text("prompt", prompt=["a"] * 129),
    text("prompt", "context_length_exceeded", prompt=[5] * 256),
    text("prompt", "context_length_exceeded", prompt=[5] * 200, max_tokens=57),
    text("prompt", "context_length_exceeded", prompt=[5] * 500_000),
    text(None, "body_too_complex", prompt=[5] * 3_000_000),
    text("prompt", "context_length_exceeded", prompt="x" * 5_000_000),
    text("logprobs", logprobs=21),
    text("logprobs", "invalid_type", logprobs=True),
    text("max_tokens", max_tokens=-1),
    text("min_tokens", max_tokens=0, min_tokens=1),
    text("prompt", "context_length_exceeded", prompt=[5] * 257, max_tokens=0),
    text("echo", "invalid_type", echo="yes"),
]

NOT_SERVED = [
    chat("function_call", "unsupported_parameter", function_call={"name": "f"}),
    chat("functions", "unsupported_parameter", functions=[{"name": "f"}]),
    chat("modalities", "unsupported_parameter", modalities=["audio"]),
    chat("skip_special_tokens", "unsupported_parameter", skip_special_tokens=False),
    chat("include_stop_str_in_output", "unsupported_parameter", include_stop_str_in_output=True),
    chat("web_search_options", "unsupported_parameter", web_search_options={}),
    text("allowed_token_ids", "unsupported_parameter", allowed_token_ids=[5]),
    chat("best_of", "unsupported_parameter", best_of=3),
    chat("echo", "unsupported_parameter", echo=True),
    text("chat_template_kwargs", "unsupported_parameter", chat_template_kwargs={"enable_thinking": False}),
    chat("chat_template_kwargs", "invalid_type", chat_template_kwargs=["a"]),
    chat("chat_template_kwargs", chat_template_kwargs={"chat_template": "{{ 1 }}"}),
    chat("chat_template_kwargs", chat_template_kwargs={"a b": True}),
    chat("chat_template_kwargs", chat_template_kwargs={"documents": []}),
    chat("chat_template_kwargs", chat_template_kwargs={"a": {"b": 1}}),
    chat("chat_template_kwargs", chat_template_kwargs={"a": "x" * 1025}),
    chat("chat_template_kwargs", chat_template_kwargs={str(number): 1 for number in range(33)}),
    chat("add_special_tokens", "unsupported_parameter", add_special_tokens=True),
    text("add_special_tokens", "unsupported_parameter", add_special_tokens=False),
    text("max_completion_tokens", "unsupported_parameter", max_completion_tokens=5),
    text("best_of", best_of=0),
    text("best_of", best_of=17),
    text("best_of", best_of=10**30),
    text("best_of", "invalid_type", best_of="3"),
    text("best_of", "invalid_type", best_of=2.0),
    text("best_of", n=3, best_of=2),
    text("best_of", best_of=2, stream=True),
    text("suffix", "unsupported_parameter", suffix="end"),
]


LORA = [
    chat("lora", "invalid_type", lora="sql"),
    lora("lora.adapters", "invalid_type", adapters="sql"),
    lora("lora.adapters.0", "invalid_type", adapters=["sql"]),
    lora("lora.adapters.0.name", "missing_required_parameter", adapters=[{"weight": 1}]),
    lora("lora.adapters.0.name", "model_not_found", 404, adapters=[{"name": "nobody"}]),
    lora("lora.adapters.1.name", "model_not_found", 404, adapters=[{"name": "sql"}, {"name": "tiny"}]),
    lora("lora.adapters.0.weight", "invalid_type", adapters=[{"name": "sql", "weight": "heavy"}]),
    lora("lora.adapters.0.weight", "invalid_type", adapters=[{"name": "sql", "weight": True}]),
    lora("lora.adapters.0.weight", adapters=[{"name": "sql", "weight": 1e39}]),
    lora("lora.adapters", adapters=[{"name": "sql"}] * 257),
    lora("lora.adapter", "unknown_parameter", adapter=[{"name": "sql"}]),
    lora("lora.topk", "unknown_parameter", topk=1),
    lora("lora.adapters.0.wieght", "unknown_parameter", adapters=[{"name": "sql", "wieght": 0.5}]),
    lora(
        "lora.adapters", adapters=[{"name": "sql", "weight": 1}, {"name": "pirate", "weight": -1}], composition="fusion"
    ),
    lora("lora.composition", composition="blend"),
    lora("lora.router", "no_router", router="retriever"),
    lora("lora.router", adapters=[{"name": "sql"}], router="retriever"),
    lora("lora.top_k", top_k=0),
    lora("lora.temperature", temperature=0),
    lora("lora.candidates", "invalid_type", candidates="sql"),
    lora("lora.sticky", "invalid_type", sticky="yes"),
]

TOKENS = [
    Case("/tokenize", {}, "prompt"),
    Case("/tokenize", {"prompt": "a", "messages": USER}, "prompt"),
    Case("/tokenize", {"prompt": 5}, "prompt", "invalid_type"),
    Case("/tokenize", {"prompt": "a", "model": "nobody"}, "model", "model_not_found", 404),
    Case("/tokenize", {"messages": [{"role": "user"}]}, "messages.0.content", "missing_required_parameter"),
    Case("/detokenize", {}, "tokens", "missing_required_parameter"),
    Case("/detokenize", {"tokens": "a"}, "tokens", "invalid_type"),
    Case("/detokenize", {"tokens": [1, "a"]}, "tokens.1", "invalid_type"),
    Case("/detokenize", {"tokens": [-1]}, "tokens"),
    Case("/detokenize", {"tokens": [1] * 1000}, "tokens", "context_length_exceeded"),
    Case("/tokenize", {"prompt": "a" * 100_000}, "prompt", "context_length_exceeded"),
    Case("/tokenize", {"messages": USER * 1000}, "messages", "context_length_exceeded"),
    Case("/detokenize", {"tokens": [2**40]}, "tokens"),
    Case("/v1/embeddings", {"input": "a", "model": "nobody"}, "model", "model_not_found", 404),
    Case("/v1/responses", {"input": "a"}, None, "unknown_endpoint", 404),
    Case("/v1/models", {}, None, "method_not_allowed", 405),
]

CASES = [*BODIES, *FIELDS, *NOT_SERVED, *LORA, *TOKENS]
