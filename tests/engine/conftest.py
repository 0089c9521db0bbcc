"""Fixtures of tests of the whole engine."""

from functools import partial
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.engine.delayed_steps import Make, make_engine
from tests.engine.spoken import spoken, tokenizer
from tests.engine.tiny_engine import Registered


@pytest.fixture(scope="session")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a tokenizer whose texts can be constrained."""
    return spoken(tiny_model, tmp_path_factory.mktemp("spoken") / "model")


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
