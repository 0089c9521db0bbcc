"""A compiler for all tests of compilation, and memory that kernels leave as it was made visible."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.offline import Compiler


@pytest.fixture(scope="session")
def compiler() -> Iterator[Compiler]:
    with Compiler() as compiler:
        yield compiler


@pytest.fixture
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Tensor.new_empty` gives NaN, in outputs and between the kernels.

    Not by `tests.kernels.poison`, which forbids cuBLAS, and so the reference on a GPU.
    """
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *size: int, **options: Any) -> Tensor:
        empty: Tensor = new_empty(self, *size, **options)
        return empty.fill_(float("nan")) if empty.is_floating_point() else empty

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
