"""The host tier: least recently used by bytes; and what a reader of folders gives it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapters_store.pages import PackedAdapter, PackedGroup, pack
from adapters_store.peft_format import read_adapter
from adapters_store.tiers import HostTier, folder_reader
from adapters_store.types import AdapterError, LinearShape

SIZES = {"a": 1, "b": 2, "c": 3, "d": 5, "e": 8, "f": 13}


def sized(digest: str) -> PackedAdapter:
    """An adapter of SIZES[digest] bytes."""
    page = torch.zeros(1, 1, 1, SIZES[digest], dtype=torch.int8), torch.empty(1, 1, 0, dtype=torch.int8)
    return PackedAdapter(digest, {"o": PackedGroup((page,), 1.0)})


@given(budget=st.integers(8, 20), wanted=st.lists(st.sampled_from("abcde"), max_size=40))
def test_least_recently_used_by_bytes(budget: int, wanted: list[str]) -> None:
    tier = HostTier(budget)
    model: list[str] = []
    reads = 0
    for digest in wanted:
        packed = tier.get(digest)
        assert (packed is not None) == (digest in model)
        if packed is None:
            reads += 1
            assert tier.insert(sized(digest))
        tier.moved.clear()
        model = [other for other in model if other != digest] + [digest]
        while sum(SIZES[other] for other in model) > budget:
            model.pop(0)
        tier.check_integrity()
        assert [other for other in SIZES if other in tier] == sorted(model)
        assert tier.num_bytes == sum(SIZES[other] for other in model)
    assert tier.counters.loads == reads
    assert tier.counters.hits == len(wanted) - reads
    assert tier.counters.evictions == reads - len(model)


def test_what_others_wait_for_is_not_dropped() -> None:
    tier = HostTier(8)
    for digest in "abd":
        assert tier.insert(sized(digest))
    tier.moved.clear()
    assert not tier.insert(sized("e"), keep={"b"})
    assert not tier.moved, "what does not fit drops nothing"
    assert tier.insert(sized("c"), keep={"b", "c"})
    assert [digest for digest in SIZES if digest in tier] == ["b", "c"]
    assert tier.moved == {"a", "c", "d"}
    assert not tier.insert(sized("f")), "larger than the budget"
    assert len(tier) == 2
    assert tier.has_room
    tier.check_integrity()


def test_drop_and_insert_again() -> None:
    tier = HostTier(8)
    assert tier.insert(sized("d"))
    assert tier.insert(sized("d"))
    assert tier.num_bytes == 5
    tier.moved.clear()
    tier.drop("d")
    tier.drop("d")
    assert tier.moved == {"d"}
    assert tier.num_bytes == 0
    tier.check_integrity()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_is_packed_as_its_weights_are(
    write: Any, config: dict[str, Any], tensors: dict[str, torch.Tensor], shape: LinearShape, dtype: torch.dtype
) -> None:
    folder: Path = write(config, tensors)
    file = read_adapter(folder, shape)
    expected = pack(file.weights, shape, dtype)
    found = folder_reader(shape, dtype)(file.digest, str(folder))
    assert found.digest == file.digest
    assert found.scales == expected.scales
    assert found.num_bytes == expected.num_bytes > 0
    for name, group in expected.groups.items():
        for one, other in zip(found.groups[name].pages, group.pages, strict=True):
            assert all(map(torch.equal, one, other))


def test_a_folder_that_is_gone_or_damaged(
    write: Any, config: dict[str, Any], tensors: dict[str, torch.Tensor], shape: LinearShape
) -> None:
    folder: Path = write(config, tensors)
    read = folder_reader(shape, torch.float32)
    weights = folder / "adapter_model.safetensors"
    packed = read("a" * 64, str(folder))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    with pytest.raises(AdapterError, match="expected a complete safetensors file") as damaged:
        read("a" * 64, str(folder))
    assert damaged.value.code == "adapter_corrupt"
    weights.unlink()
    with pytest.raises(AdapterError, match="is missing"):
        read("a" * 64, str(folder))
    assert all(part.isfinite().all() for group in packed.groups.values() for page in group.pages for part in page)


def test_what_was_read_does_not_change_with_the_file(
    write: Any, config: dict[str, Any], tensors: dict[str, torch.Tensor], shape: LinearShape
) -> None:
    folder: Path = write(config, tensors)
    packed = folder_reader(shape, torch.float32)("a" * 64, str(folder))
    before = [part.clone() for group in packed.groups.values() for page in group.pages for part in page]
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1024, 2)
        file.write(b"\x3f" * 1024)
    after = [part for group in packed.groups.values() for page in group.pages for part in page]
    assert all(map(torch.equal, before, after))
