"""Mapped tensors against the library's own reader."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file

from adapters_store.safetensors_file import MappedTensors, TensorWriter, header_of
from adapters_store.types import AdapterError

TENSORS = {
    "b": torch.randn(3, 5),
    "a": torch.randn(2, 7).to(torch.bfloat16),
    "c": torch.randn(1, 1).to(torch.float16),
    "empty": torch.empty(0, 4),
}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_tensors_are_those_that_the_library_reads(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path, metadata)
    file = MappedTensors(path)
    assert [head.name for head in file.headers] == sorted(TENSORS)
    for head in file.headers:
        expected = load_file(path)[head.name]
        assert head.shape == expected.shape
        assert file.tensor(head).dtype == expected.dtype
        assert torch.equal(file.tensor(head), expected)


def test_tensors_that_are_not_aligned(tmp_path: Path) -> None:
    """The format asks writers to align the header, and readers not to count on it."""
    values = torch.randn(2, 3)
    header = json.dumps({"x": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
    for padding in range(8):
        path = tmp_path / f"{padding}.safetensors"
        text = header + b" " * padding
        path.write_bytes(struct.pack("<Q", len(text)) + text + values.numpy().tobytes())
        file = MappedTensors(path)
        assert torch.equal(file.tensor(file.headers[0]), values)


def test_nothing_is_copied(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.zeros(4096)}, path)
    file = MappedTensors(path)
    values = file.tensor(file.headers[0])
    with path.open("r+b") as raw:
        raw.seek(-4, 2)
        raw.write(struct.pack("<f", 2.5))
    assert values[-1] == 2.5
    values[0] = 1.0
    assert not load_file(path)["x"][0], "and what is written stays private"


@pytest.mark.parametrize("names", ["cba", "abc", 'é\u2028"\\'])
def test_the_writer_writes_what_the_library_writes(tmp_path: Path, names: str) -> None:
    dtypes = (torch.float16, torch.float32, torch.bfloat16, torch.float32)
    tensors = {name: torch.randn(3, i + 1).to(dtypes[i]) for i, name in enumerate(names)}
    with TensorWriter(tmp_path / "x", [header_of(*item) for item in tensors.items()]) as file:
        for name in reversed(names):
            file.write(name, tensors[name].T.contiguous().T)
    assert (tmp_path / "x").read_bytes() == save(tensors)


def test_a_header_too_long_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parsing would hold up all threads for seconds."""
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path, {str(i): "x" * 100 for i in range(50_000)})
    monkeypatch.setattr("adapters_store.safetensors_file.safe_open", pytest.fail)
    with pytest.raises(AdapterError, match="expected a complete safetensors file with at most 4194304") as caught:
        MappedTensors(path)
    assert caught.value.code == "adapter_corrupt"


@pytest.mark.parametrize("content", [b"", b"\x02\0\0\0\0\0\0\0{}x", b"\xff\xff\0\0\0\0\0\0xxx"])
def test_what_is_not_a_whole_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(SafetensorError):
        MappedTensors(path)
