"""Adapters that come to a GPU while it works: copies beside steps, pages that change hands, graphs captured then."""

import json
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from adapters_store.linear_names import module_path
from adapters_store.pages import PackedAdapter, pack
from adapters_store.pool import PagePool
from adapters_store.types import GROUPS, TARGETS, AdapterWeights, LinearShape, LoraPair, Mix
from adapters_store.upload import Upload, Uploader, write_pages
from server.engine.engine import Engine
from server.engine.graphs import GraphSteps
from server.engine.sequence import Output, Request
from server.model.config import ModelConfig
from tests.conftest import MakeAdapter
from tests.engine.tiny_engine import Registered, run, tokens_of
from tests.gpu.test_gpu_engine import GREEDY, no_waiting, prompt, real_engine, tiny_engine

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")]

DEVICE = torch.device("cuda", 0)
EIGHT_BILLION = LinearShape(
    32,
    dict.fromkeys(TARGETS, 4096) | {"down_proj": 14336},
    dict.fromkeys(TARGETS, 4096) | {"k_proj": 1024, "v_proj": 1024, "gate_proj": 14336, "up_proj": 14336},
)
NUM_ADAPTERS = 12


def say(capsys: pytest.CaptureFixture[str], line: str) -> None:
    with capsys.disabled():
        print(f"\n{line}")  # noqa: T201 - the measurement is wanted beside the verdict


def random_packed(shape: LinearShape, rank: int, targets: tuple[str, ...] = TARGETS, seed: int = 0) -> PackedAdapter:
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        (layer, target): LoraPair(
            torch.randn(rank, shape.inputs[target], generator=generator).bfloat16(),
            torch.randn(shape.outputs[target], rank, generator=generator).bfloat16(),
            1.0,
        )
        for layer in range(shape.num_layers)
        for target in targets
    }
    return pack(AdapterWeights(f"{seed:064x}", pairs), shape, torch.bfloat16, pinned=True)


def wait(upload: Upload) -> float:
    """Seconds until the copies were done, asking as the engine does."""
    started = time.perf_counter()
    while not upload.done():
        time.sleep(1e-5)
    return time.perf_counter() - started


def check_pages(pool: PagePool, packed: PackedAdapter, pages: dict[str, tuple[int, ...]]) -> None:
    """The pages are those that the CPU writes."""
    twin = PagePool(pool.shape, dict(pool.num_pages), torch.device("cpu"), pool.dtype)
    write_pages(packed, pages, twin.tensors)
    for name, own in pages.items():
        for found, expected in zip(pool.tensors[name], twin.tensors[name], strict=True):
            assert torch.equal(found[:, list(own)].cpu(), expected[:, list(own)])


class TestUploader:
    @pytest.mark.parametrize("rank", [5, 16, 40])
    def test_pages_equal_those_of_a_cpu(self, rank: int) -> None:
        shape = LinearShape(3, dict.fromkeys(TARGETS, 48), dict.fromkeys(TARGETS, 40))
        pool = PagePool(shape, 8, DEVICE, torch.bfloat16)
        for pair in pool.tensors.values():
            for part in pair:
                part.fill_(torch.nan)
        uploader = Uploader(pool.tensors, DEVICE)
        uploads = []
        for seed, targets in enumerate((TARGETS, ("q_proj", "v_proj"), ("down_proj", "up_proj"))):
            packed = random_packed(shape, rank, targets, seed)
            count = -(-rank // 16)
            pages = {name: tuple(range(7 - seed, 7 - seed - count, -1)) for name in packed.groups}
            if seed:
                pages = {name: tuple(range(count)) for name in packed.groups}
            with no_waiting():
                uploads.append((uploader.start(packed, pages), packed, pages))
        for upload, _, _ in uploads:
            wait(upload)
        for upload, packed, pages in uploads:
            assert upload.packed is packed
            check_pages(pool, packed, pages)

    def test_steps_that_were_launched_before_still_read_the_old_pages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The copies wait for them on the device, the host does not."""
        pool = PagePool(EIGHT_BILLION, 2, DEVICE, torch.bfloat16)
        uploader = Uploader(pool.tensors, DEVICE)
        old, new = (random_packed(EIGHT_BILLION, 16, ("q_proj", "o_proj"), seed) for seed in (1, 2))
        pages = {"qkv": (1,), "o": (0,)}
        wait(uploader.start(old, pages))
        expected = pool.tensors["qkv"][0][:, 1].clone()
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)  # about 0.1 s of a step that reads the pages at its end
        read = pool.tensors["qkv"][0][:, 1].clone()
        step = torch.cuda.current_stream(DEVICE).record_event()
        with no_waiting(), monkeypatch.context() as patch:
            patch.setattr(torch.cuda.Event, "synchronize", None)  # what that mode does not know as waiting
            upload = uploader.start(new, pages)
        wait(upload)
        assert step.query(), "the pages are written when the step is over"
        assert torch.equal(read, expected)
        check_pages(pool, new, pages)

    def test_84_megabytes_of_an_adapter_for_eight_billion_parameters(self, capsys: pytest.CaptureFixture[str]) -> None:
        pool = PagePool(EIGHT_BILLION, 4, DEVICE, torch.bfloat16)
        uploader = Uploader(pool.tensors, DEVICE)
        packed = random_packed(EIGHT_BILLION, 16)
        size = sum(part.nbytes for group in packed.groups.values() for page in group.pages for part in page)
        host, device = [], []
        for number in range(10):
            started = time.perf_counter()
            with no_waiting():
                upload = uploader.start(packed, {group.name: (number % 4,) for group in GROUPS})
            host.append(time.perf_counter() - started)
            wait(upload)
            device.append(time.perf_counter() - started)
        check_pages(pool, packed, {group.name: (3,) for group in GROUPS})
        best, launch = min(device), min(host)
        say(
            capsys,
            f"{size / 1e6:.1f} MB to the device in {best * 1e3:.2f} ms ({size / best / 1e9:.1f} GB/s), median"
            f" {statistics.median(device) * 1e3:.2f} ms; launching takes the host {launch * 1e3:.2f} ms;"
            f" {packed.num_bytes / 1e6:.1f} MB of page-locked memory",
        )


@pytest.fixture(scope="module")
def many(tiny_model: Path, make_adapter: MakeAdapter) -> Registered:
    folders = {}
    for number in range(NUM_ADAPTERS):
        rank = (4, 16, 24)[number % 3]
        folders[str(number)] = make_adapter(f"loading-{number}", seed=200 + number, r=rank, strength=0.19 * rank**0.25)
    return Registered(tiny_model, folders)


def cold_requests(many: Registered, count: int = 40) -> list[Request]:
    """Each with other adapters than those around it, some with two."""
    requests = []
    for row in range(count):
        weights = {str(row % NUM_ADAPTERS): 1.0}
        if row % 5 == 0:
            weights[str((row + 5) % NUM_ADAPTERS)] = -0.5
        mix = many.mix(weights)
        params = replace(GREEDY, max_tokens=6 + row % 9)
        requests.append(Request(str(row), prompt(row, 2 + row % 13), params, mix, many.paths, mix.digest.encode()))
    return requests


def few_pages(folder: Path, graphs: str, **settings: object) -> Engine:
    """Pages for about four of the adapters, so that most requests evict another one's."""
    roomy = tiny_engine(folder, "eager").runner.pool
    one = roomy.num_bytes // min(roomy.num_pages.values())
    return tiny_engine(folder, graphs, max_num_seqs=4, max_batch_tokens=32, page_memory=6 * one, **settings)


@pytest.fixture(scope="module")
def expected(tiny_model: Path, many: Registered) -> dict[str, tuple[int, ...]]:
    """The texts of `cold_requests` on a CPU, where all adapters have pages."""
    engine = tiny_engine(tiny_model, backend="reference", device="cpu", max_num_seqs=4, max_batch_tokens=32)
    return run(engine, cold_requests(many))


def without_waiting(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever waits for the device while adapters are moved or steps are launched raises."""

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            with no_waiting():
                return call(*arguments, **options)

        return wrapped

    for owner, names in ((engine.adapters, ("poll", "acquire")), (engine.runner, ("launch", "choose"))):
        for name in names:
            monkeypatch.setattr(owner, name, watched(getattr(owner, name)))


@pytest.mark.parametrize("graphs", ["capture", "lazy", "eager"])
def test_pages_that_change_hands_give_the_texts_of_a_cpu(
    tiny_model: Path, many: Registered, expected: dict[str, tuple[int, ...]], graphs: str
) -> None:
    engine = few_pages(tiny_model, graphs)
    assert run(engine, cold_requests(many)) == expected
    stats = engine.stats()
    assert stats.adapter_evictions > 10
    assert stats.adapters_host == NUM_ADAPTERS
    steps = engine.runner.steps
    assert isinstance(steps, GraphSteps)
    assert not steps._without
    again = [replace(request, id=f"{request.id} again") for request in cold_requests(many)]
    assert run(engine, again) == {f"{name} again": tokens for name, tokens in expected.items()}
    engine.close()


def test_loading_never_waits_for_the_device(
    tiny_model: Path, many: Registered, expected: dict[str, tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = few_pages(tiny_model, "lazy")
    run(engine, cold_requests(many))  # compiles, captures, and locks the memory of all adapters
    without_waiting(engine, monkeypatch)
    again = [replace(request, id=f"{request.id} again") for request in cold_requests(many)]
    loads = engine.stats().adapter_loads
    assert run(engine, again) == {f"{name} again": tokens for name, tokens in expected.items()}
    assert engine.stats().adapter_loads > loads + 10
    engine.close()


def test_graphs_are_captured_while_other_threads_use_the_device(
    tiny_model: Path, many: Registered, expected: dict[str, tuple[int, ...]]
) -> None:
    """Page-locked memory is allocated, and events are made, by another thread all the time."""
    engine, ended = few_pages(tiny_model, "lazy"), threading.Event()
    rounds = 0

    def disturb() -> None:
        nonlocal rounds
        stream = torch.cuda.Stream(DEVICE)
        kept = []
        while not ended.is_set():
            pinned = torch.empty((1 << 16) + 4096 * (rounds % 64), pin_memory=True)
            with torch.cuda.stream(stream):
                kept.append(pinned.to(DEVICE, non_blocking=True))
                stream.record_event().query()
            kept = kept[-3:]
            rounds += 1

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        assert run(engine, cold_requests(many)) == expected
    finally:
        ended.set()
        thread.join()
    steps = engine.runner.steps
    assert isinstance(steps, GraphSteps)
    assert steps.num_graphs > 0
    assert not steps._without, "a capture failed"
    assert rounds > 10
    engine.close()


def write_adapter(folder: Path, shape: LinearShape, seed: int) -> None:
    """Rank 16 on all linears, in fp32."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(shape.num_layers):
        for target in TARGETS:
            name = f"base_model.model.{module_path(layer, target)}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(16, shape.inputs[target], generator=generator) * 0.03
            tensors[f"{name}.lora_B.weight"] = torch.randn(shape.outputs[target], 16, generator=generator) * 0.01
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": list(TARGETS)}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_decoding_goes_on_while_adapters_come(
    smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """16 rows decode; then the same again while a cold adapter is asked for every 20 steps. Texts are the same."""
    shape = ModelConfig.from_folder(smollm2).linear_shape
    paths = {f"{seed:064x}": str(tmp_path / str(seed)) for seed in range(8)}
    for seed in range(8):
        write_adapter(tmp_path / str(seed), shape, seed)
    engine = real_engine(
        smollm2, "cuda", "float32", max_num_seqs=24, max_batch_tokens=128, page_memory=1 << 28, prefix_cache=False
    )
    params = replace(GREEDY, max_tokens=200)
    steady = [Request(f"steady {row}", prompt(row, 8), params) for row in range(16)]

    def serve(arrivals: bool) -> tuple[dict[str, tuple[int, ...]], list[float], dict[str, float]]:
        outputs: dict[str, list[Output]] = {}
        seconds: list[float] = []
        added: dict[str, float] = {}
        first: dict[str, float] = {}
        for request in steady:
            engine.add_request(request)
        while engine.has_work:
            if arrivals and len(seconds) % 20 == 10 and len(added) < len(paths):
                digest = f"{len(added):064x}"
                cold = Request(f"cold {len(added)}", prompt(3, 8), replace(GREEDY, max_tokens=4), single(digest), paths)
                added[cold.id] = time.perf_counter()
                engine.add_request(cold)
            started = time.perf_counter()
            for output in engine.step():
                outputs.setdefault(output.request_id, []).append(output)
                if output.request_id in added:
                    first.setdefault(output.request_id, time.perf_counter() - added[output.request_id])
            seconds.append(time.perf_counter() - started)
        return {name: tokens_of(own) for name, own in outputs.items()}, seconds, first

    serve(False)
    alone, calm, _ = serve(False)
    mixed, busy, first = serve(True)
    assert {name: text for name, text in mixed.items() if name in alone} == alone
    assert len(first) == len(paths)
    assert engine.stats().adapter_loads == len(paths)

    def shown(times: list[float]) -> str:
        ordered = sorted(times)
        return f"median {statistics.median(times) * 1e3:.2f} ms, 99 % {ordered[int(0.99 * len(times))] * 1e3:.2f} ms"

    say(
        capsys,
        f"steps of 16 rows: {shown(calm)}; while {len(paths)} cold adapters of 20 MB come: {shown(busy)}, longest"
        f" {max(busy) * 1e3:.2f} ms; their first tokens after {shown(list(first.values()))}",
    )
    engine.close()


def single(digest: str) -> Mix:
    return Mix(((digest, 1.0),))
