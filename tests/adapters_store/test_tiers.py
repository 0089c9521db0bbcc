"""The host tier: least recently used by bytes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapters_store.peft_format import read_adapter
from adapters_store.tiers import HostTier, folder_reader
from adapters_store.types import AdapterError, AdapterWeights, LinearShape, LoraPair

SIZES = {"a": 1, "b": 2, "c": 3, "d": 5, "e": 8, "f": 13}


def sized(digest: str) -> AdapterWeights:
    """An adapter of SIZES[digest] bytes."""
    return AdapterWeights(
        digest, {(0, "q_proj"): LoraPair(torch.zeros(SIZES[digest], 1, dtype=torch.int8), torch.empty(0), 1.0)}
    )


@given(budget=st.integers(8, 20), wanted=st.lists(st.sampled_from("abcde"), max_size=40))
def test_least_recently_used_by_bytes(budget: int, wanted: list[str]) -> None:
    reads: list[tuple[str, str]] = []

    def read(digest: str, path: str) -> AdapterWeights:
        reads.append((digest, path))
        return sized(digest)

    tier = HostTier(budget, read)
    model: list[str] = []
    for digest in wanted:
        expected_reads = len(reads) + (digest not in model)
        assert tier.get(digest, f"/{digest}").digest == digest
        assert len(reads) == expected_reads
        model = [other for other in model if other != digest] + [digest]
        while sum(SIZES[other] for other in model) > budget:
            model.pop(0)
        tier.check_integrity()
        assert [other for other in SIZES if other in tier] == sorted(model)
        assert tier.num_bytes == sum(SIZES[other] for other in model)
    assert tier.counters.loads == len(reads)
    assert tier.counters.hits == len(wanted) - len(reads)
    assert tier.counters.evictions == len(reads) - len(model)
    assert all(path == f"/{digest}" for digest, path in reads)


def test_larger_than_the_budget() -> None:
    tier = HostTier(8, lambda digest, _: sized(digest))
    tier.get("d", "")
    with pytest.raises(AdapterError, match="13 bytes, expected at most") as caught:
        tier.get("f", "")
    assert (caught.value.code, caught.value.status) == ("adapter_too_large", 413)
    assert "d" in tier
    assert "f" not in tier
    tier.drop("d")
    tier.drop("d")
    tier.check_integrity()
    assert tier.num_bytes == 0


def test_folder_reader_notices_other_contents(
    write: Any, config: dict[str, Any], tensors: dict[str, torch.Tensor], shape: LinearShape
) -> None:
    folder: Path = write(config, tensors)
    digest = read_adapter(folder, shape).digest
    tier = HostTier(1 << 20, folder_reader(shape))
    assert tier.get(digest, str(folder)).digest == digest
    tier.drop(digest)
    write(config | {"lora_alpha": 1}, tensors)
    with pytest.raises(AdapterError, match="changed after registration") as caught:
        tier.get(digest, str(folder))
    assert caught.value.code == "adapter_corrupt"
    assert digest not in tier
