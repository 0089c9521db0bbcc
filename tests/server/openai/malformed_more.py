"""More malformed requests: embeddings, what nests and repeats, what is cut off, and how bodies are sent."""

from typing import Any

from malformed import CHAT, TEXT, USER, Case, chat, lora, raw, text

EMBEDDINGS = "/v1/embeddings"
GOOD_CHAT = b'{"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0.5}'


def embed(param: str | None, code: str = "invalid_value", status: int = 400, **fields: Any) -> Case:
    return Case(EMBEDDINGS, {"model": "tiny", "input": "Hi", **fields}, param, code, status)


def deep(levels: int, inner: object = 1, *, of: str = "list") -> object:
    """Nested `levels` times."""
    for _ in range(levels):
        inner = [inner] if of == "list" else {"a": inner}
    return inner


def cut(at: int) -> Case:
    return raw(GOOD_CHAT[:at])


OF_EMBEDDINGS = [
    embed("lora", "unsupported_parameter", lora={"adapters": [{"name": "sql"}]}),
    embed("adapter_id", "unsupported_parameter", adapter_id="sql"),
    embed("model", "missing_required_parameter", model=...),
    embed("model", "invalid_type", model=None),
    embed("model", "invalid_type", model=["tiny"]),
    embed("model", "invalid_value", model=""),
    embed("model", "model_not_found", 404, model="nobody"),
    embed("input", "missing_required_parameter", input=...),
    embed("input", "invalid_type", input=None),
    embed("input", "invalid_type", input=5),
    embed("input", "invalid_type", input=[]),
    embed("input", "invalid_type", input=[None]),
    embed("input", "invalid_type", input=[["a"]]),
    embed("input", "invalid_type", input=[[]]),
    embed("input", "invalid_type", input=deep(500)),
    embed("input", input=["a"] * 2049),
    embed("input", input=[[1]] * 2049),
    embed("encoding_format", encoding_format="int8"),
    embed("encoding_format", encoding_format=64),
    embed("dimensions", dimensions=0),
    embed("dimensions", "invalid_type", dimensions="big"),
    embed("dimensions", "invalid_type", dimensions=1.5),
    embed("dimensions", "invalid_type", dimensions=True),
    embed("truncate_prompt_tokens", truncate_prompt_tokens=0),
    raw(b'{"model": "tiny", "input": NaN}', url=EMBEDDINGS),
    raw(b'{"model": "tiny", "input": ["\\ud800"]}', "input.0", "invalid_value", EMBEDDINGS),
    raw(b"input=Hi", url=EMBEDDINGS),
]

NESTED = [
    chat("temperature", "invalid_type", temperature=deep(900)),
    chat("stop", "invalid_type", stop=deep(900, of="object")),
    chat("messages.0", "invalid_type", messages=[deep(500)]),
    chat("messages.0.content", "invalid_type", messages=[{"role": "user", "content": deep(500, of="object")}]),
    chat("messages.0.content.0", "invalid_type", messages=[{"role": "user", "content": deep(500)}]),
    chat("messages", messages=USER * 8193),
    chat("messages", messages=[{"role": "user", "content": [{"type": "text", "text": "a"}] * 9000}]),
    chat("logit_bias", logit_bias={str(token): 1 for token in range(1025)}),
    chat("logit_bias.5", "invalid_type", logit_bias={"5": deep(300)}),
    chat("logit_bias", logit_bias={"5" * 400: 1}),
    chat("logit_bias.5", "invalid_type", logit_bias={"5": None}),
    chat("stop_token_ids", stop_token_ids=[1] * 1025),
    chat("stop_token_ids.0", stop_token_ids=[2**31]),
    chat("stop_token_ids.1", "invalid_type", stop_token_ids=[1, None]),
    chat("stop", stop=["a"] * 100_000),
    chat("stop.0", stop=["x" * 4097]),
    chat("stop.3", "invalid_type", stop=["a", "b", "c", ["d"]]),
    chat("n", n=2**63),
    chat("n", n=-1),
    chat("n", "invalid_type", n=1e30),
    chat("n", "invalid_type", n=[1]),
    chat("seed", seed=-(2**63) - 1),
    chat("seed", seed=10**400),
    chat("top_k", top_k=2**31),
    chat("top_p", "invalid_type", top_p={}),
    chat("min_p", min_p=-1e-9),
    chat("temperature", temperature=1e308),
    chat("repetition_penalty", repetition_penalty=101),
    chat("max_tokens", max_tokens=-(2**62)),
    chat("messages", "context_length_exceeded", max_tokens=2**62),
    chat("model", "invalid_value", model="x" * 257),
    chat("model", "model_not_found", 404, model="sql\u0000"),
    chat("model", "model_not_found", 404, model="漢字"),
    chat("model", "model_not_found", 404, model="sql@"),
    chat("model", "model_not_found", 404, model="tiny@" + "0" * 64),
    chat("lora", "invalid_type", lora=[]),
    chat("lora", "invalid_type", lora=deep(500)),
    lora("lora.adapters.0.name", "invalid_type", adapters=[{"name": None}]),
    lora("lora.adapters.0.name", "invalid_value", adapters=[{"name": ""}]),
    lora("lora.adapters.0.name", "invalid_value", adapters=[{"name": "x" * 257}]),
    lora("lora.adapters.255", "invalid_type", adapters=[{"name": "sql"}] * 255 + [7]),
    lora("lora.min_score", "invalid_type", min_score="high"),
    lora("lora.query", query="everything"),
    lora("lora.score_mass", score_mass=0),
    lora("lora.score_mass", score_mass=1.01),
    lora("lora.top_k", "invalid_type", top_k="3"),
    lora("lora.candidates", candidates=["sql"] * 257),
    lora("lora.candidates.0", "invalid_type", candidates=[None]),
    text("prompt", "invalid_type", prompt=[[1, [2]]]),
    text("prompt", "invalid_type", prompt=deep(800)),
    text("prompt", "invalid_type", prompt=[None]),
    text("prompt", "invalid_type", prompt=[["a"]]),
    text("prompt", prompt=[[1]] * 129),
    text("prompt", prompt=[[-5], [1]]),
]

REPEATED = [
    raw(b'{"a": {"b": [{"c": 1, "c": 1}]}}', "c", "duplicate_field"),
    raw(
        b'{"model": "tiny", "messages": [{"role": "user", "content": "a", "role": "user"}]}', "role", "duplicate_field"
    ),
    raw(b'{"model": "tiny", "prompt": "a", "logit_bias": {"1": 1, "1": 2}}', "1", "duplicate_field", TEXT),
    raw(b'{"' + b"k" * 5000 + b'": 1, "' + b"k" * 5000 + b'": 2}', "k" * 100, "duplicate_field"),
    raw(b'{"model": "tiny", "messages": [], "unknown": {"deep": [1, NaN]}}'),
    raw(b'{"model": "tiny", "messages": [], "unknown": Infinity}'),
    raw(b'{"model": "tiny", "unknown": "\\udc00"}', "unknown", "invalid_value"),
]

SENT = [
    *(cut(at) for at in (1, 10, 25, 40, 60, 80, len(GOOD_CHAT) - 1)),
    raw(GOOD_CHAT + b"}"),
    raw(GOOD_CHAT + GOOD_CHAT),
    raw(b"\xef\xbb\xbf" + GOOD_CHAT),
    raw(GOOD_CHAT.decode().encode("utf-16")),
    raw(b"\x00" + GOOD_CHAT),
    raw(GOOD_CHAT.replace(b"Hi", b"H\x00i")),
    raw(GOOD_CHAT.replace(b"Hi", b"\xc3")),
    raw(GOOD_CHAT.replace(b'"', b"'")),
    raw(GOOD_CHAT.replace(b"0.5", b".5")),
    raw(GOOD_CHAT.replace(b"0.5", b"0x1")),
    raw(GOOD_CHAT.replace(b"0.5", b"+1")),
    raw(GOOD_CHAT.replace(b"0.5", b"True")),
    raw(GOOD_CHAT.replace(b"0.5}", b"0.5,}")),
    raw(b"// comment\n" + GOOD_CHAT),
    raw(b"5"),
    raw(b"true"),
    raw(b" \n\t "),
    Case(CHAT, GOOD_CHAT, None, "unsupported_media_type", 415, "multipart/form-data; boundary=x"),
    Case(CHAT, GOOD_CHAT, None, "unsupported_media_type", 415, "application/xml"),
    Case(CHAT, GOOD_CHAT, None, "unsupported_media_type", 415, "json"),
    Case(EMBEDDINGS, b"{}", None, "unsupported_media_type", 415, "text/plain"),
    Case("/tokenize", b"{}", None, "unsupported_media_type", 415, "text/plain"),
]

MORE_CASES = [*OF_EMBEDDINGS, *NESTED, *REPEATED, *SENT]
