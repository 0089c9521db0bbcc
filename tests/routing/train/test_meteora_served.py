"""A trained token-level router does in the engine what it did in training."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from meteora_world import toy_task, write_adapter

from adapters_store.types import Mix
from routing.gate_folder import GateCard, load_gates
from routing.train.meteora import train_meteora
from routing.train.meteora_model import load_gated_model
from routing.train.meteora_recipe import MeteoraRecipe
from routing.train.router_recipe import RouterRun
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.gates import GateUse
from server.engine.sequence import Output, Request, SamplingParams

TASKS = [toy_task("ab", "ab"), toy_task("xyz", "xyz"), toy_task("plain", "pq")]
PARAMS = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0)
PROMPTS = [tuple((5 * row + 7 * place) % 250 for place in range(3 + 8 * row)) for row in range(4)]


@pytest.fixture(scope="module")
def adapters(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    write_adapter(root / "ab", chat_model, {"q_proj": 2, "down_proj": 5}, seed=1)
    write_adapter(root / "xyz", chat_model, {"down_proj": 3, "o_proj": 18}, seed=2, layers=1)
    return {name: root / name for name in ("ab", "xyz")}


def served(model: Path, folder: Path, card: GateCard, adapters: dict[str, Path]) -> Iterator[list[Output]]:
    """The answers to all prompts, which share their steps."""
    memory = {"kv_memory": 1 << 21, "page_memory": 1 << 21, "max_batch_tokens": 24, "max_num_seqs": 8}
    engine = Engine.from_config(
        EngineConfig(str(model), device="cpu", gates="routing.token_router:TokenGateFactory", **memory)  # type: ignore[arg-type]
    )
    digests = tuple(adapter.digest for adapter in card.adapters)
    use = GateUse(card.sha256, str(folder), digests, card.top_k, card.temperature, card.has_null)
    mix = Mix(tuple((digest, 1.0) for digest in sorted(digests)))
    paths = {adapter.digest: str(adapters[adapter.name]) for adapter in card.adapters}
    for number, prompt in enumerate(PROMPTS):
        engine.add_request(Request(str(number), prompt, PARAMS, mix, paths, gates=use))
    outputs: dict[str, list[Output]] = {str(number): [] for number in range(len(PROMPTS))}
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output)
        engine.check_integrity()
    yield from outputs.values()


@pytest.mark.parametrize(("top_k", "null"), [(1, False), (2, False), (2, True), (3, True)])
def test_the_engine_says_what_the_trained_model_says(
    chat_model: Path, adapters: dict[str, Path], tmp_path: Path, top_k: int, null: bool
) -> None:
    tasks = TASKS if null else TASKS[:2]
    recipe = MeteoraRecipe(steps=12, batch_size=4, learning_rate=3e-2, max_length=80, top_k=top_k, null=null)
    run = RouterRun(progress=False, evaluation_rows=1, base_name="tiny")
    result = train_meteora(chat_model, tasks, adapters, tmp_path / "router", recipe, run)
    model = load_gated_model(chat_model, tasks, adapters, recipe, "cpu")
    for module, gate in load_gates(result.folder).items():
        model.linears[module].gate.data.copy_(gate)
    for prompt, outputs in zip(PROMPTS, served(chat_model, result.folder, result.card, adapters), strict=True):
        tokens = list(prompt)
        for output in outputs:
            with torch.inference_mode():
                logits = model.causal(torch.tensor([tokens])).logits[0, -1].log_softmax(dim=0)
            assert output.tokens == (int(logits.argmax()),)
            assert output.logprobs[0].logprob == pytest.approx(float(logits.max()), abs=1e-3)
            tokens += output.tokens
        assert len(tokens) == len(prompt) + PARAMS.max_tokens
