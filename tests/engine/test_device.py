"""Which device an engine takes."""

import pytest
import torch

from server.engine.runner import choose_device
from server.model.config import ModelError


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert {choose_device(name) for name in ("auto", "auto:0", "auto:3", "cpu")} == {torch.device("cpu")}
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ModelError, match="no CUDA device"):
            choose_device(name)


def test_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    chosen = [choose_device(name) for name in ("auto", "cuda", "auto:1", "cuda:1", "cuda:0")]
    assert [device.index for device in chosen] == [0, 0, 1, 1, 0]
    assert choose_device("cpu") == torch.device("cpu")
    for name in ("auto:2", "cuda:2"):
        with pytest.raises(ModelError, match="GPU 2 was asked for, but there are 2"):
            choose_device(name)
