"""A tiny trainable chat model, a random Llama over a byte-level vocabulary; processes of a fake encoder, and processes
on one registry."""

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import fake_encoder
import pytest
import pytest_asyncio
import torch
from encoder_folder import Folder, Make
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adapters_store.registry import Registry, TenantRow
from routing.encoder import EncoderProcess
from tests.routing.prototype_process import Process

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose tokenizer knows single bytes, `<s>`, `</s>` (end of turn) and `<pad>`."""
    folder = tmp_path_factory.mktemp("model") / "chat"
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>", "<pad>")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.15,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def fake_folder(tmp_path: Path) -> Folder:
    (tmp_path / "encoder").mkdir()
    return Folder(tmp_path / "encoder")


@pytest_asyncio.fixture
async def make_process(fake_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Make]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    made: list[EncoderProcess] = []

    def make(**options: Any) -> EncoderProcess:
        given = {"loader": fake_encoder.LOADER, "identify": fake_encoder.identify, "restart_seconds": 0.0} | options
        made.append(EncoderProcess(fake_folder.path, **given))
        return made[-1]

    yield make
    for process in made:
        await process.close()
        assert process.pid is None


@pytest.fixture(scope="session")
def registry_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry that knows the tenant acme."""
    path = tmp_path_factory.mktemp("sync") / "registry.db"
    registry = Registry.open(f"sqlite:///{path}", lambda: 1.0)
    registry.accounts.add(TenantRow("acme"))
    registry.close()
    return path


@pytest.fixture
def registry_url(registry_template: Path, tmp_path: Path) -> str:
    (tmp_path / "registry.db").write_bytes(registry_template.read_bytes())
    return f"sqlite:///{tmp_path / 'registry.db'}"


@pytest.fixture
def process(registry_url: str) -> Iterator[Process]:
    """One on a registry of this test's own."""
    registry = Registry.open(registry_url, lambda: 1.0)
    yield Process(registry)
    registry.close()


@pytest.fixture
def other(registry_url: str) -> Iterator[Process]:
    """Another one on the same registry."""
    registry = Registry.open(registry_url, lambda: 1.0)
    yield Process(registry)
    registry.close()
