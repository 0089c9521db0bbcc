"""Traces survive being written and read, and refuse what is none."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.trace import FIRST_TOKEN_ID, Trace, TraceError, TraceRequest

names = st.none() | st.text("abc-1", min_size=1, max_size=8)
requests = st.builds(
    TraceRequest,
    at=st.floats(0, 1e6, allow_nan=False),
    output_tokens=st.integers(1, 4096),
    prompt_tokens=st.integers(1, 4096),
    prompt=st.none() | st.text(min_size=1, max_size=20),
    adapter=names,
    tenant=st.sampled_from(["default", "acme", "küche"]),
    extra=st.dictionaries(st.sampled_from(["lora", "seed"]), st.integers(0, 9), max_size=2),
)


@given(st.lists(requests, min_size=1, max_size=10))
def test_written_and_read_again_it_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, asked: list[TraceRequest]
) -> None:
    path = tmp_path_factory.mktemp("trace") / "trace.jsonl"
    trace = Trace.of(asked, at_once=3)
    trace.write(path)
    assert Trace.read(path, at_once=3) == trace


def test_requests_are_in_the_order_of_their_times() -> None:
    trace = Trace.of([TraceRequest(at, 1, 1, adapter=f"a{at:.0f}", tenant="t") for at in (3.0, 1.0, 2.0)])
    assert [request.at for request in trace.requests] == [1.0, 2.0, 3.0]
    assert (trace.adapters, trace.tenants) == (("a1", "a2", "a3"), ("t",))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "at least one request"),
        ('{"at": 0, "output_tokens": 1, "prompt_tokens": 1}\nnonsense', "line 2"),
        ('{"at": -1, "output_tokens": 1, "prompt_tokens": 1}', "line 1: expected at >= 0"),
        ('{"at": 0, "output_tokens": 0, "prompt_tokens": 1}', "output_tokens >= 1"),
        ('{"at": 0, "output_tokens": 1}', "a prompt or prompt_tokens"),
        ('{"at": NaN, "output_tokens": 1, "prompt_tokens": 1}', "expected at >= 0"),
        ('{"at": 0, "output_tokens": 1, "prompt_tokens": 1, "model": "x"}', "some of adapter, at, extra"),
        ("[1]", "expected an object"),
        ('{"at": "soon", "output_tokens": 1, "prompt_tokens": 1}', "line 1"),
    ],
)
def test_what_is_no_trace(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(TraceError, match=said):
        Trace.read(path)


def test_prompts_depend_on_place_and_seed_alone() -> None:
    request = TraceRequest(0.0, 1, 50)
    first = request.prompt_of(0, 0, 1000)
    assert first == TraceRequest(9.0, 5, 50, adapter="x").prompt_of(0, 0, 1000)
    assert len(first) == 50
    assert all(FIRST_TOKEN_ID <= token < 1000 for token in first)
    assert first not in (request.prompt_of(1, 0, 1000), request.prompt_of(0, 1, 1000))
    assert TraceRequest(0.0, 1, prompt="hello").prompt_of(0, 0, 1000) == "hello"
