"""Whatever crosses the process boundary arrives equal, and of the same types."""

import dataclasses
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters_store.types import Composition, Mix
from server.engine.config import EngineConfig, EngineInfo, EngineStats
from server.engine.constraint import Constraint, ConstraintKind
from server.engine.gates import GateUse
from server.engine.messages import (
    Abort,
    Evict,
    FromEngine,
    Hello,
    Left,
    Pin,
    Prefetch,
    ReadAhead,
    Ready,
    Refusal,
    Reply,
    Shutdown,
    Start,
    StartFailed,
    Submit,
    ToEngine,
    Unpin,
    Update,
    decode_from_engine,
    decode_to_engine,
    encode,
)
from server.engine.prompt_routers import Decided, PromptUse
from server.engine.sequence import FinishReason, Output, Request, SamplingParams, Timings, TokenLogprobs

CONFIG = EngineConfig(
    model="folder",
    device="cuda:1",
    dtype="bfloat16",
    max_num_seqs=3,
    max_batch_tokens=77,
    max_model_len=1024,
    kv_memory=1 << 40,
    page_memory=5,
    host_memory=6,
    block_size=32,
    prefix_cache=False,
    num_threads=2,
    backend="triton",
    load_format="random",
    seed=4,
    cuda_graphs="lazy",
    kernel_cache="/cache",
    load_threads=3,
    gates="package.module:Factory",
    gate_slots=2,
    gates_per_slot=32,
    prompt_routers="package.module:Other",
    max_layered_tokens=99,
    grammar_memory=7,
    mask_threads=3,
    log_format="json",
    log_level="debug",
)
PARAMS = SamplingParams(
    temperature=0.3,
    top_k=5,
    top_p=0.9,
    min_p=0.1,
    presence_penalty=-1.0,
    frequency_penalty=0.5,
    repetition_penalty=1.1,
    logit_bias={7: -100.0, 0: 2.5},
    seed=2**63 + 5,
    max_tokens=99,
    min_tokens=2,
    stop_token_ids=frozenset({1, 2}),
    ignore_eos=True,
    logprobs=0,
    prompt_logprobs=5,
    pooled=True,
    constraint=Constraint(ConstraintKind.CHOICE, '["ja", "nein"]'),
)
REQUEST = Request(
    id="r-1",
    prompt=(1, 2, 3),
    params=PARAMS,
    mix=Mix.of([("b" * 64, -0.5), ("a" * 64, 1 / 3)], Composition.FUSION),
    paths={"a" * 64: "/adapters/a", "b" * 64: "/adapters/ü b"},
    cache_key=bytes(range(256)),
    tenant="team",
    weight=2.5,
    gates=GateUse("d" * 64, "/routers/d", ("a" * 64, None), 2, 0.5, null=True),
    timeout=1.5,
    priority=-3,
    prompt_router=PromptUse("e" * 64, "/routers/e", ("a" * 64, None), layered=True, top_k=3),
    log={"request_id": "ü", "trace_id": "7" * 32},
)
OUTPUT = Output(
    request_id="r-1",
    tokens=(5, 6),
    logprobs=(TokenLogprobs(-0.1, ((5, -0.1), (9, -2.0)), 1), TokenLogprobs(-3.5)),
    finish_reason=FinishReason.LENGTH,
    error="one sentence",
    error_param="lora.adapters",
    error_code="mix_too_large",
    timings=Timings(queue=0.25, prefill=0.5, loading=0.125, preempted=(0.5, 0.25)),
    cached_tokens=16,
    shares=(0.25, 0.75),
    prompt_logprobs=(TokenLogprobs(-2.5, (), 17),),
    decided=Decided(((0, 2), ()), ((0.5, 0.25, 0.25), (1.0, 0.0, 0.0)), 0.125, cached=True),
    pooled=b"\x00\x00\x80?",
)
STATS = EngineStats(
    running=1,
    waiting=2,
    kv_used_blocks=3,
    kv_blocks=4,
    pages={"used": 1, "free": 2},
    prefix_queries=5,
    prefix_hits=6,
    preemptions=7,
    adapter_loads=8,
    adapter_evictions=9,
    adapter_reads=(0.1, 0.2),
    host_evictions=12,
    host_bytes=13,
    host_budget=14,
    host_shrinks=15,
    adapters_host=10,
    adapters_device=11,
    running_adapters=("a", "b"),
    waiting_adapters=("c",),
    steps=((0.01, 64), (0.02, 512)),
)
INFO = EngineInfo(
    model_fingerprint="f" * 64,
    max_model_len=2048,
    num_kv_blocks=100,
    block_size=16,
    num_pages={"qkv": 8, "o": 4},
    vocab_size=49152,
    eos_token_ids=(2, 0),
    device="cpu",
    dtype="float32",
    memory={"weights": 1, "kv": 2, "pages": 3},
)
TO_ENGINE: list[ToEngine] = [
    Start(CONFIG),
    Hello(),
    Left("front"),
    Submit(REQUEST),
    Abort("r-1"),
    ReadAhead({"a" * 64: "/adapters/a"}),
    Pin(7, "a" * 64, "/adapters/a"),
    Unpin("a" * 64),
    Prefetch(8, "a" * 64, "/adapters/a"),
    Evict("a" * 64),
    Shutdown(),
]
FROM_ENGINE: list[FromEngine] = [
    Ready(INFO),
    StartFailed("no such folder"),
    Update(),
    Update([OUTPUT, Output("r-2")], [Refusal("r-3", "too long", "prompt", "context_length_exceeded")], stats=STATS),
    Update(refusals=[Refusal("r-3", "unreadable", None, "adapter_unavailable")]),
    Update(replies=[Reply(7, True), Reply(8, "host"), Reply(9, error="unreadable", code="adapter_unavailable")]),
    Update(residency={"a" * 64: "device", "b" * 64: "disk"}),
]


def assert_same_types(found: Any, expected: Any) -> None:
    """Equality alone would take an enum for its value, or 1 for 1.0."""
    assert type(found) is type(expected)
    if dataclasses.is_dataclass(expected):
        for field in dataclasses.fields(expected):
            assert_same_types(getattr(found, field.name), getattr(expected, field.name))
    elif isinstance(expected, msgspec.Struct):
        for name in expected.__struct_fields__:
            assert_same_types(getattr(found, name), getattr(expected, name))
    elif isinstance(expected, dict):
        assert_same_types(sorted(found.items()), sorted(expected.items()))
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same_types(one, other)
    else:
        assert found == expected


@pytest.mark.parametrize("message", TO_ENGINE, ids=lambda message: type(message).__name__)
def test_messages_to_the_engine(message: ToEngine) -> None:
    decoded = decode_to_engine(encode(message))
    assert decoded == message
    assert_same_types(decoded, message)


@pytest.mark.parametrize("message", FROM_ENGINE, ids=lambda message: type(message).__name__)
def test_messages_from_the_engine(message: FromEngine) -> None:
    decoded = decode_from_engine(encode(message))
    assert decoded == message
    assert_same_types(decoded, message)


@pytest.mark.parametrize(
    "example", [CONFIG, PARAMS, REQUEST, REQUEST.gates, OUTPUT, STATS, OUTPUT.logprobs[0]], ids=repr
)
def test_the_examples_leave_no_field_at_its_default(example: Any) -> None:
    for field in dataclasses.fields(example):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        assert getattr(example, field.name) != default, f"{field.name} is at its default"


def test_a_digest_that_was_computed_before_does_not_travel() -> None:
    mix = Mix((("a" * 64, 0.5),))
    cold = encode(Submit(Request("r", (1,), PARAMS, mix=mix)))
    assert mix.digest
    assert encode(Submit(Request("r", (1,), PARAMS, mix=mix))) == cold


def test_every_ending_travels() -> None:
    for reason in FinishReason:
        decoded = decode_from_engine(encode(Update([Output("r", finish_reason=reason)])))
        assert isinstance(decoded, Update)
        assert decoded.outputs[0].finish_reason is reason


def test_updates_do_not_share_their_lists() -> None:
    first, second = Update(), Update()
    first.outputs.append(OUTPUT)
    first.residency["a"] = "host"
    assert second.outputs == []
    assert second.residency == {}


@pytest.mark.parametrize("decode", [decode_to_engine, decode_from_engine])
@pytest.mark.parametrize("data", [b"", b"\xc1", encode({"type": "Nonsense"}), encode([1])], ids=repr)
def test_nonsense_is_refused(decode: Any, data: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode(data)


finite = st.floats(allow_nan=False, allow_infinity=False)
tokens = st.integers(0, 2**31 - 1)
params = st.builds(
    SamplingParams,
    temperature=finite,
    top_k=tokens,
    top_p=finite,
    min_p=finite,
    presence_penalty=finite,
    frequency_penalty=finite,
    repetition_penalty=finite,
    logit_bias=st.dictionaries(tokens, finite, max_size=5),
    seed=st.integers(-(2**63), 2**64 - 1),
    max_tokens=tokens,
    min_tokens=tokens,
    stop_token_ids=st.frozensets(tokens, max_size=5),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
)
texts = st.text(st.characters(codec="utf-8"), max_size=30)
requests = st.builds(
    Request,
    id=texts,
    prompt=st.lists(tokens, max_size=40).map(tuple),
    params=params,
    mix=st.builds(Mix, st.lists(st.tuples(texts, finite), max_size=4).map(tuple), st.sampled_from(list(Composition))),
    paths=st.dictionaries(texts, texts, max_size=4),
    cache_key=st.binary(max_size=40),
    tenant=texts,
)


@given(requests)
def test_any_request_arrives_as_it_was(request: Request) -> None:
    decoded = decode_to_engine(encode(Submit(request)))
    assert isinstance(decoded, Submit)
    assert_same_types(decoded.request, request)
    assert decoded.request.mix.digest == request.mix.digest
