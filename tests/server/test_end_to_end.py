"""`loramux serve` as its users run it: a process with a real engine and a tiny model, asked over a real socket."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from byte_tokenizer import byte_level_tokenizer
from openai import APIStatusError, AsyncOpenAI, OpenAI
from peft import PeftModel
from served import MESSAGES, OPTIONS, Served, reference_text
from transformers import AutoModelForCausalLM

from server.config import ServeSettings, Settings
from server.opening import open_services


@pytest.fixture(scope="module")
def adapter_folder(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters-to-serve")
    for name, folder in adapters.items():
        shutil.copytree(folder, root / name)
    return root


@pytest.fixture(scope="module")
def served(served_model: Path, adapter_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(served_model, tmp_path_factory.mktemp("data"), "--adapters", str(adapter_folder))
    yield served
    assert served.stop() == 0


@pytest.fixture
def openai_client(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=served.base_url, api_key="none", max_retries=0) as client:
        yield client


def test_different_mixes_at_once_equal_transformers_and_peft(
    served: Served, served_model: Path, adapters: dict[str, Path]
) -> None:
    mixes: list[dict[str, float]] = [
        {},
        {"all4": 1.0},
        {"wide24": 1.0},
        {"rslora8": 1.0},
        {"qv16": 1.0},
        {"all4": 0.5, "wide24": 0.25},
        {"all4": 0.7, "qv16": 0.6, "wide24": 0.3},
        {"wide24": 0.9, "qv16": 0.2},
    ]

    async def ask(client: AsyncOpenAI, weights: dict[str, float]) -> str:
        adapters = [{"name": name, "weight": weight} for name, weight in weights.items()]
        stream = await client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,  # type: ignore[arg-type]
            max_tokens=16,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True} | ({"lora": {"adapters": adapters}} if adapters else {}),
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

    async def ask_all() -> list[str]:
        async with AsyncOpenAI(base_url=served.base_url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, weights) for weights in mixes))

    answers = asyncio.run(ask_all())
    expected = [reference_text(served_model, adapters, weights, 16) for weights in mixes]
    assert answers == expected
    assert len(set(answers)) > 4


def test_the_lora_object_and_the_models(openai_client: OpenAI) -> None:
    names = [model.id for model in openai_client.models.list()]
    assert names == ["tiny", "all4", "qv16", "rslora8", "wide24"]
    answer = openai_client.chat.completions.create(model="qv16", messages=MESSAGES, max_tokens=4)  # type: ignore[arg-type]
    assert answer.model_extra is not None
    assert [adapter["name"] for adapter in answer.model_extra["lora"]["adapters"]] == ["qv16"]


def test_a_repeated_prompt_comes_from_the_prefix_cache_of_its_own_mix(openai_client: OpenAI) -> None:
    def ask(model: str) -> int:
        prompt = "The quick brown fox jumps over the lazy dog. " * 4
        answer = openai_client.completions.create(model=model, prompt=prompt, max_tokens=2)
        assert answer.usage is not None
        details = answer.usage.prompt_tokens_details
        return details.cached_tokens or 0 if details else 0

    assert ask("all4") == 0
    assert ask("all4") > 0
    assert ask("tiny") == 0


def test_echoed_prompts_are_scored_as_by_transformers_and_peft(
    openai_client: OpenAI, served_model: Path, adapters: dict[str, Path]
) -> None:
    tokenizer, text = byte_level_tokenizer(), "The quick brown fox, naïve and fine: 漢字."
    ids = tokenizer.encode(text)
    for name in ("tiny", "all4"):
        loaded = AutoModelForCausalLM.from_pretrained(served_model, dtype=torch.float32).eval()
        if name != "tiny":
            loaded = PeftModel.from_pretrained(loaded, str(adapters[name])).eval()
        with torch.inference_mode():
            rows = loaded(input_ids=torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
        expected = rows.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        for prompt in (text, ids):
            answer = openai_client.completions.create(
                model=name, prompt=prompt, echo=True, logprobs=1, max_tokens=0, temperature=0
            )
            (choice,) = answer.choices
            assert choice.text == text
            assert choice.logprobs is not None
            first, *found = choice.logprobs.token_logprobs or ()
            assert first is None
            assert found == pytest.approx(expected.tolist(), abs=1e-4)
            tops = [max(top.values()) for top in (choice.logprobs.top_logprobs or ())[1:]]
            assert tops == pytest.approx(rows.amax(-1).tolist(), abs=1e-4)


def test_clients_that_leave_free_their_sequences(served: Served) -> None:
    """While tokens come, before the first one, and without streaming."""
    body = {"model": "all4", "messages": MESSAGES, "max_tokens": 400, "ignore_eos": True, "temperature": 0}
    url = f"{served.base_url}/chat/completions"
    for stream, timeout in ((True, None), (True, 0.05), (False, 0.3)):
        with httpx.Client(timeout=httpx.Timeout(30, read=timeout)) as client:
            if timeout is None:
                with client.stream("POST", url, json=body | {"stream": stream}) as answer:
                    lines = answer.iter_lines()
                    assert all(next(lines).startswith(("data: ", "")) for _ in range(6))
            else:
                with contextlib.suppress(httpx.ReadTimeout):
                    client.post(url, json=body | {"stream": stream})
        served.until(lambda: served.metric("loramux_requests_running") == 0)
        served.until(lambda: served.metric("loramux_kv_cache_usage_ratio") == 0)


def test_an_engine_killed_under_load_comes_back(served: Served) -> None:
    body = {"model": "wide24", "messages": MESSAGES, "max_tokens": 400, "n": 8, "ignore_eos": True, "stream": True}

    async def read(client: httpx.AsyncClient) -> list[str]:
        async with client.stream("POST", f"{served.base_url}/chat/completions", json=body) as answer:
            return [line.removeprefix("data: ") async for line in answer.aiter_lines() if line]

    async def kill_under_load() -> tuple[list[list[str]], int]:
        """What the streams said, and the engine that was killed."""
        async with httpx.AsyncClient(timeout=120) as client:
            streams = [asyncio.create_task(read(client)) for _ in range(12)]
            await asyncio.to_thread(served.until, lambda: served.metric("loramux_requests_running") > 0)
            killed = served.engine_pid
            os.kill(killed, signal.SIGKILL)
            return await asyncio.gather(*streams), killed

    streams, killed = asyncio.run(kill_under_load())
    endings = [json.loads([line for line in lines if line.startswith("{")][-1]) for lines in streams]
    cut = ["error" in ending for ending in endings]
    assert any(cut)
    # Where this process had to wait for long, a stream may have come to its end before the engine was killed.
    whole = [ending["choices"][0] for ending, is_cut in zip(endings, cut, strict=True) if not is_cut]
    assert {choice["finish_reason"] for choice in whole} <= {"length"}
    served.until(lambda: served.get("/health").status_code == 200)
    assert served.engine_pid != killed
    with OpenAI(base_url=served.base_url, api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(model="wide24", messages=MESSAGES, max_tokens=4)  # type: ignore[arg-type]
    assert answer.choices[0].finish_reason in ("stop", "length")


@pytest.mark.slow
def test_a_mix_too_large_is_a_clear_400_and_sigterm_lets_streams_finish(
    served_model: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    """A pool of two pages a group cannot hold the three of one mix; the server goes on, and ends when it is told to."""
    small = Served(served_model, tmp_path, "--adapters", str(adapter_folder), "--page-memory", "450KiB")
    with OpenAI(base_url=small.base_url, api_key="none", max_retries=0) as client:
        mix = {"lora": {"adapters": [{"name": "all4"}, {"name": "wide24"}]}}
        with pytest.raises(APIStatusError) as refused:
            client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body=mix)  # type: ignore[call-overload]
        assert (refused.value.status_code, refused.value.code) == (400, "mix_too_large")  # type: ignore[attr-defined]
        stream = client.chat.completions.create(
            model="wide24",
            messages=MESSAGES,  # type: ignore[arg-type]
            max_tokens=300,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        small.process.terminate()
        rest = [chunk for chunk in stream if chunk.choices]
    assert rest[-1].choices[0].finish_reason == "length"
    assert small.ended() == 0


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}'), "gpt2"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"garbage"), "model.safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer"),
    ],
)
async def test_a_broken_model_folder_is_one_sentence(
    served_model: Path, tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(served_model, broken)
    damage(broken)
    with pytest.raises((ValueError, RuntimeError), match=re.escape(said)) as refused:
        async with open_services(Settings(data_dir=tmp_path, serve=ServeSettings(model=str(broken), device="cpu"))):
            pass
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_a_broken_adapter_is_one_line_on_stderr(served_model: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(adapters["all4"], tmp_path / "bad")
    (tmp_path / "bad" / "adapter_model.safetensors").write_bytes(b"x" * 100)
    command = [
        sys.executable,
        "-m",
        "server.cli",
        "serve",
        "--model",
        str(served_model),
        *OPTIONS,
        "--data-dir",
        str(tmp_path / "data"),
        "--adapters",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"loramux: .*bad.*\n", done.stderr)
