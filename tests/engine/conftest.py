"""Fixtures of tests of the whole engine."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.engine.delayed_steps import Make, make_engine
from tests.engine.engine_client import ENDLESS
from tests.engine.spoken import spoken, tokenizer
from tests.engine.tiny_engine import Registered


@pytest.fixture(scope="session")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a tokenizer whose texts can be constrained."""
    return spoken(tiny_model, tmp_path_factory.mktemp("spoken") / "model")


@pytest.fixture(scope="session")
def endless_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, for answers so long that none is over before this process, which may have to wait, looks at it.

    Those of 400 tokens took half a second.
    """
    folder = tmp_path_factory.mktemp("endless") / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": ENDLESS}))
    return folder


@pytest.fixture(scope="session")
def words() -> Tokenizer:
    """That tokenizer."""
    return tokenizer()


@pytest.fixture
def registered(tiny_model: Path, adapters: dict[str, Path]) -> Registered:
    return Registered(tiny_model, adapters)


@pytest.fixture
def make(tiny_model: Path) -> Make:
    """`make(ahead, **settings)`: an engine on the CPU, whose host is one step ahead or not."""
    return partial(make_engine, tiny_model)
